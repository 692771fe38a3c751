// Weights from columns to panels, in place, and back.
#include "panels.h"

#include <memory>

#include "check.h"

namespace nudging {
namespace {

using cpu::bf16;
using cpu::f16;

template <class Body>
void with_weight(WeightType type, const Body& body) {
  switch (type) {
    case WeightType::f32:
      return body(float{});
    case WeightType::bf16:
      return body(bf16{});
    case WeightType::f16:
      return body(f16{});
    case WeightType::int8:
      return body(std::int8_t{});
  }
}

}  // namespace

void pack_weight(void* weight, WeightType type, std::int64_t in, std::int64_t cols, Team& team) {
  with_weight(type, [&](auto element) {
    using W = decltype(element);
    const std::int64_t panels = (cols + kLinearPanel - 1) / kLinearPanel;
    const Span span{panels, in * cols * 8};
    team.run(span, [&](Worker& worker) {
      worker.share(span, [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t size = kLinearPanel * in;
        const std::unique_ptr<W[]> packed(new W[static_cast<std::size_t>(size)]);
        for (std::int64_t panel = begin; panel < end; ++panel) {
          W* here = static_cast<W*>(weight) + panel * size;
          const std::int64_t left = cols - panel * kLinearPanel;
          cpu::pack(here, in, left < kLinearPanel ? left : kLinearPanel, in, packed.get());
          std::memcpy(static_cast<void*>(here), packed.get(),
                      static_cast<std::size_t>(size) * sizeof(W));
        }
      });
    });
  });
}

void unpack_columns(const void* weight, WeightType type, std::int64_t in, std::int64_t cols,
                    const std::int64_t* ids, std::int64_t count, void* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= cols)
      cpu::refuse("unpack_columns: id ", ids[i], " of ", cols, " columns");
  }
  with_weight(type, [&](auto element) {
    using W = decltype(element);
    for (std::int64_t row = 0; row < count; ++row) {
      const std::int64_t col = ids[row] % kLinearPanel;
      const W* panel = static_cast<const W*>(weight) + (ids[row] - col) * in;
      cpu::unpack(panel, col, in, static_cast<W*>(out) + row * in);
    }
  });
}

}  // namespace nudging
