// The order of a decoder's ops, each thread walking through all of it; see nudging/team.h.
#include "nudging/decoder.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "metadata.h"
#include "span.h"

namespace nudging {
namespace {

using cpu::Kernels;
using cpu::Part;
using cpu::refuse;

constexpr std::int64_t kAlignment = 64;

// What a pass needs between its ops, all in one allocation.
class Scratch {
 public:
  Scratch(const DecoderModel& m, const DecoderBatch& b)
      : element_(m.dtype == DType::f32 ? 4 : 2), wide_(std::max(b.rows, b.num_logits)) {
    const std::int64_t q = m.heads * m.head_dim;
    const std::int64_t sizes[] = {
        m.hidden, m.hidden, m.hidden,           q + 2 * m.kv_heads * m.head_dim,
        q,        q,        2 * m.intermediate, m.intermediate,
        m.hidden, m.hidden};
    char** const places[] = {&x,        &y,       &normed, &qkv,      &q_turned,
                             &attended, &gate_up, &act,    &wanted_x, &wanted_y};
    std::int64_t total = kAlignment;
    for (const std::int64_t size : sizes) total += bytes(size);
    memory_.reset(new char[static_cast<std::size_t>(total)]);
    char* place = memory_.get() + kAlignment -
                  reinterpret_cast<std::uintptr_t>(memory_.get()) % std::uintptr_t{kAlignment};
    for (std::size_t i = 0; i < std::size(sizes); ++i) {
      *places[i] = place;
      place += bytes(sizes[i]);
    }
  }

  char *x, *y, *normed, *qkv, *q_turned, *attended, *gate_up, *act, *wanted_x, *wanted_y;

 private:
  std::int64_t bytes(std::int64_t columns) const {
    return (wide_ * columns * element_ + kAlignment - 1) / kAlignment * kAlignment;
  }

  std::int64_t element_, wide_;
  std::unique_ptr<char[]> memory_;
};

class Pass {
 public:
  Pass(const DecoderModel& model, const DecoderBatch& batch, const Kernels& kernels)
      : m_(model), b_(batch), k_(kernels), s_(model, batch) {
    const std::int64_t element = m_.dtype == DType::f32 ? 4 : 2;
    row_bytes_ = m_.hidden * element;
    head_bytes_ = m_.head_dim * element;
    layer_bytes_ = b_.num_blocks * b_.block_size * m_.kv_heads * head_bytes_;
  }

  void operator()(Worker& worker) const {
    const void* x = b_.x;     // the residual stream
    const void* y = nullptr;  // what the block before gives to it
    for (std::size_t index = 0; index < m_.layers.size(); ++index) {
      const DecoderLayer& layer = m_.layers[index];
      const void* in = enter_block(worker, x, y, layer.attn_norm);
      attention(worker, index, in);
      y = leave_block(worker, layer.attn_post_norm);
      in = enter_block(worker, x, y, layer.mlp_norm);
      feed_forward(worker, layer, in);
      y = leave_block(worker, layer.mlp_post_norm);
    }
    head(worker, x, y);
  }

 private:
  template <class Args>
  static void run(Worker& worker, Part<Args> part, const Args& args) {
    worker.share(cpu::span(args), [&](auto begin, auto end) { part(args, begin, end); });
  }

  void project(Worker& worker, const Projection& by, const void* x, void* out, std::int64_t in,
               std::int64_t cols) const {
    run(worker, k_.linear,
        Linear{x, by.weight, by.scales, by.bias, out, b_.rows, in, cols, m_.dtype, m_.dtype,
               by.is_packed});
  }

  // x + y becomes x where there is a y; returns what the block reads, its norm if there is one.
  const void* enter_block(Worker& worker, const void*& x, const void* y, const void* weight) const {
    if (m_.pre_norm) return add_norm(worker, x, y, weight, b_.rows);
    return add(worker, x, y, b_.rows);
  }

  const void* leave_block(Worker& worker, const void* weight) const {
    if (m_.post_norm) norm(worker, s_.y, weight, s_.y, b_.rows);
    return s_.y;
  }

  const void* add(Worker& worker, const void*& x, const void* y, std::int64_t rows) const {
    if (y != nullptr) {
      run(worker, k_.add, Add{x, y, s_.x, rows * m_.hidden, m_.dtype});
      x = s_.x;
    }
    return x;
  }

  const void* add_norm(Worker& worker, const void*& x, const void* y, const void* weight,
                       std::int64_t rows) const {
    if (y != nullptr && weight != nullptr) {
      run(worker, k_.rms_norm,
          RmsNorm{x, y, s_.x, weight, s_.normed, rows, m_.hidden, 1, m_.hidden, m_.eps,
                  m_.unit_offset, m_.dtype});
      x = s_.x;
    } else {
      norm(worker, add(worker, x, y, rows), weight, s_.normed, rows);
    }
    return s_.normed;
  }

  void norm(Worker& worker, const void* x, const void* weight, void* out, std::int64_t rows) const {
    if (weight == nullptr) {
      run(worker, k_.layer_norm, LayerNorm{x, out, rows, m_.hidden, m_.eps, m_.dtype});
    } else {
      run(worker, k_.rms_norm,
          RmsNorm{x, nullptr, nullptr, weight, out, rows, m_.hidden, 1, m_.hidden, m_.eps,
                  m_.unit_offset, m_.dtype});
    }
  }

  // The norm of `heads` heads of every row of qkv, in place: of each of them or of all at once.
  void qk_norm(Worker& worker, char* first, std::int64_t heads, const void* weight) const {
    const bool each = m_.qk_norm == QkNorm::head;
    const std::int64_t group = each ? heads : 1, dim = m_.head_dim * (each ? 1 : heads);
    run(worker, k_.rms_norm,
        RmsNorm{first, nullptr, nullptr, weight, first, b_.rows * group, dim, group,
                (m_.heads + 2 * m_.kv_heads) * m_.head_dim, m_.eps, m_.unit_offset, m_.dtype});
  }

  void attention(Worker& worker, std::size_t index, const void* in) const {
    const DecoderLayer& layer = m_.layers[index];
    const std::int64_t width = (m_.heads + 2 * m_.kv_heads) * m_.head_dim;
    char *k = s_.qkv + m_.heads * head_bytes_, *v = k + m_.kv_heads * head_bytes_;
    char* k_cache =
        static_cast<char*>(b_.k_cache) + static_cast<std::int64_t>(index) * layer_bytes_;
    char* v_cache =
        static_cast<char*>(b_.v_cache) + static_cast<std::int64_t>(index) * layer_bytes_;
    project(worker, layer.qkv, in, s_.qkv, m_.hidden, width);
    if (m_.qk_norm != QkNorm::none) {
      qk_norm(worker, s_.qkv, m_.heads, layer.q_norm);
      qk_norm(worker, k, m_.kv_heads, layer.k_norm);
    }
    run(worker, k_.rope_append,
        RopeAppend{s_.qkv,
                   k,
                   v,
                   width,
                   width,
                   width,
                   b_.positions,
                   layer.cos,
                   layer.sin,
                   s_.q_turned,
                   k_cache,
                   v_cache,
                   b_.slot_mapping,
                   b_.rows,
                   m_.heads,
                   m_.kv_heads,
                   m_.head_dim,
                   layer.half,
                   m_.max_position,
                   b_.num_blocks * b_.block_size,
                   m_.dtype});
    run(worker, k_.paged_attention, attention_args(layer, k_cache, v_cache));
    project(worker, layer.o, s_.attended, s_.y, m_.heads * m_.head_dim, m_.hidden);
  }

  PagedAttention attention_args(const DecoderLayer& layer, const void* k, const void* v) const {
    return {s_.q_turned,
            k,
            v,
            s_.attended,
            b_.block_tables,
            b_.cu_seqlens_q,
            b_.seq_lens,
            b_.rows,
            b_.seqs,
            m_.heads,
            m_.kv_heads,
            m_.head_dim,
            b_.num_blocks,
            b_.block_size,
            b_.max_blocks,
            m_.attention_scale,
            layer.window,
            m_.attention_soft_cap,
            m_.dtype};
  }

  void feed_forward(Worker& worker, const DecoderLayer& layer, const void* in) const {
    project(worker, layer.gate_up, in, s_.gate_up, m_.hidden, 2 * m_.intermediate);
    run(worker, k_.gated_act,
        GatedAct{s_.gate_up, s_.act, b_.rows, m_.intermediate, m_.activation, m_.dtype});
    project(worker, layer.down, s_.act, s_.y, m_.intermediate, m_.hidden);
  }

  // The logits of the wanted rows.
  void head(Worker& worker, const void* x, const void* y) const {
    const Span wanted{b_.num_logits, b_.num_logits * m_.hidden};
    worker.share(wanted, [&](auto begin, auto end) {
      gather(x, s_.wanted_x, begin, end);
      if (y != nullptr) gather(y, s_.wanted_y, begin, end);
    });
    x = s_.wanted_x;
    y = y == nullptr ? nullptr : s_.wanted_y;
    const void* in = add_norm(worker, x, y, m_.norm, b_.num_logits);
    run(worker, k_.linear,
        Linear{in, m_.head.weight, m_.head.scales, m_.head.bias, b_.logits, b_.num_logits,
               m_.hidden, m_.vocab, m_.dtype, DType::f32, m_.head.is_packed});
    if (m_.final_soft_cap > 0) {
      run(worker, k_.soft_cap,
          SoftCap{b_.logits, b_.logits, b_.num_logits * m_.vocab, m_.final_soft_cap, DType::f32});
    }
  }

  void gather(const void* from, char* to, std::int64_t begin, std::int64_t end) const {
    for (std::int64_t i = begin; i < end; ++i) {
      std::memcpy(to + i * row_bytes_,
                  static_cast<const char*>(from) + b_.logit_rows[i] * row_bytes_,
                  static_cast<std::size_t>(row_bytes_));
    }
  }

  const DecoderModel& m_;
  const DecoderBatch& b_;
  const Kernels& k_;
  Scratch s_;
  std::int64_t row_bytes_, head_bytes_, layer_bytes_;
};

// As each op alone would refuse it, but everything before anything is written.
void check(const DecoderModel& m, const DecoderBatch& b) {
  std::vector<std::int64_t> windows;
  for (const DecoderLayer& layer : m.layers) {
    cpu::check_angles("decode", Rope{nullptr, b.positions, layer.cos, layer.sin, nullptr, b.rows,
                                     m.heads, m.head_dim, layer.half, m.max_position, m.dtype});
    if (std::find(windows.begin(), windows.end(), layer.window) != windows.end()) continue;
    windows.push_back(layer.window);
    cpu::check_attention({nullptr, nullptr, nullptr, nullptr, b.block_tables, b.cu_seqlens_q,
                          b.seq_lens, b.rows, b.seqs, m.heads, m.kv_heads, m.head_dim, b.num_blocks,
                          b.block_size, b.max_blocks, m.attention_scale, layer.window,
                          m.attention_soft_cap, m.dtype});
  }
  KvAppend slots{};
  slots.slot_mapping = b.slot_mapping;
  slots.rows = b.rows;
  slots.slots = b.num_blocks * b.block_size;
  cpu::check_slots("decode", slots);
  for (std::int64_t i = 0; i < b.num_logits; ++i) {
    if (b.logit_rows[i] < 0 || b.logit_rows[i] >= b.rows)
      refuse("decode: logit row ", b.logit_rows[i], " is wanted, there are ", b.rows, " rows");
  }
}

}  // namespace

void decode(const DecoderModel& m, const DecoderBatch& b, Isa isa, Team& team) {
  const Kernels& kernels = cpu::kernels(isa);
  check(m, b);
  const std::int64_t widest = std::max(m.intermediate * b.rows, m.vocab / 2 * b.num_logits);
  const Pass pass(m, b, kernels);
  team.run(Span{2 * widest, 2 * widest * m.hidden}, pass);
}

}  // namespace nudging
