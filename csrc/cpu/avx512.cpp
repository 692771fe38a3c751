// Compiled with AVX-512 switched on; see CMakeLists.txt.
#include "avx512.h"

#include "table.h"

namespace nudging::cpu {

struct Avx512 : Avx512Lanes<Avx512> {};

const Kernels kAvx512 = kTable<Avx512>;

}  // namespace nudging::cpu
