// gptq_rows.h, compiled for AVX2.
#define LANES 8
#include "gptq_rows.h"

namespace remanence {

const GptqKernels gptq_avx2 = {LANES, gptq_rows, clip_row};

}  // namespace remanence
