// gptq_rows.h, compiled for AVX-512.
#define LANES 16
#include "gptq_rows.h"

namespace remanence {

const GptqKernels gptq_avx512 = {LANES, gptq_rows, clip_row};

}  // namespace remanence
