#pragma once

#include <cstdint>

namespace nudging::cpu {

// Below this many elementary steps per thread, waking a thread costs more than it brings.
constexpr std::int64_t kStepsPerThread = std::int64_t{1} << 18;

// part(begin, end) over [0, count) in one contiguous piece per thread.  `steps` is the work of the
// whole in multiply-adds or the like; a small problem stays on the caller's thread.
template <class Part>
void parallel(std::int64_t count, std::int64_t steps, int threads, const Part& part) {
  std::int64_t pieces = steps / kStepsPerThread;
  if (pieces > threads) pieces = threads;
  if (pieces > count) pieces = count;
  if (pieces <= 1) {
    if (count > 0) part(std::int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(pieces)) schedule(static, 1)
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    part(count * piece / pieces, count * (piece + 1) / pieces);
  }
}

}  // namespace nudging::cpu
