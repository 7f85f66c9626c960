// The table of AVX-512 with VNNI (Cascade Lake, Ice Lake).
#include "vnni.h"

#include "avx512.h"

namespace remanence {

const Kernels avx512_vnni_kernels = {"avx512_vnni",
                                     avx512::unpack_row,
                                     avx512::scale_row,
                                     load_row,
                                     store_row,
                                     quantize_row,
                                     hadamard_row,
                                     multiply24,
                                     expand24,
                                     read_bytes,
                                     peak_float,
                                     peak_int8,
                                     nullptr,
                                     kLanes,
                                     {direct_int8, place_int8, kAlways, kAlways, nullptr, nullptr, 0, 0},
                                     {direct_float, place_float, kAlways, kAlways, expand_float, panel_float, 256, 512},
                                     {}};

}  // namespace remanence
