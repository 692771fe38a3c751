// With bind_fast_path.cpp the only files that see pybind11: one m.def per op.  Arrays come as the
// integers of `tensor.data_ptr()`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_fast_path.h"
#include "nudging/cpu.h"
#include "nudging/decoder.h"
#include "nudging/pages.h"

namespace py = pybind11;

using namespace nudging;

using Address = std::uintptr_t;
using Size = std::int64_t;

namespace {

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (weight, scales, bias, is_packed)
using Addresses = std::tuple<Address, Address, Address, bool>;

Projection projection(const Addresses& from) {
  const auto& [weight, scales, bias, is_packed] = from;
  return {at(weight), at<float>(scales), at(bias), is_packed};
}

void bind_decoder(py::module_& m) {
  py::enum_<QkNorm>(m, "QkNorm")
      .value("none", QkNorm::none)
      .value("head", QkNorm::head)
      .value("full", QkNorm::full);
  py::class_<DecoderModel>(m, "DecoderModel")
      .def(py::init([](DType dtype, Activation activation, QkNorm qk_norm, Size hidden, Size heads,
                       Size kv_heads, Size head_dim, Size intermediate, Size vocab,
                       Size max_position, float eps, float attention_scale,
                       float attention_soft_cap, float final_soft_cap, bool unit_offset,
                       bool pre_norm, bool post_norm, Address norm, const Addresses& head) {
        return DecoderModel{{},
                            at(norm),
                            projection(head),
                            hidden,
                            heads,
                            kv_heads,
                            head_dim,
                            intermediate,
                            vocab,
                            max_position,
                            eps,
                            attention_scale,
                            attention_soft_cap,
                            final_soft_cap,
                            unit_offset,
                            pre_norm,
                            post_norm,
                            qk_norm,
                            activation,
                            dtype};
      }))
      .def("add_layer",
           [](DecoderModel& model, const Addresses& qkv, const Addresses& o,
              const Addresses& gate_up, const Addresses& down, Address attn_norm,
              Address attn_post_norm, Address mlp_norm, Address mlp_post_norm, Address q_norm,
              Address k_norm, Address cos, Address sin, Size half, Size window) {
             model.layers.push_back({projection(qkv), projection(o), projection(gate_up),
                                     projection(down), at(attn_norm), at(attn_post_norm),
                                     at(mlp_norm), at(mlp_post_norm), at(q_norm), at(k_norm),
                                     at<float>(cos), at<float>(sin), half, window});
           });
  m.def(
      "decode",
      [](Isa isa, Team& team, const DecoderModel& model, Address x, Address positions,
         Address slot_mapping, Address block_tables, Address cu_seqlens_q, Address seq_lens,
         Address logit_rows, Address k_cache, Address v_cache, Address logits, Size rows, Size seqs,
         Size max_blocks, Size num_blocks, Size block_size, Size num_logits) {
        using Int = std::int32_t;
        decode(model,
               {at(x), at<Size>(positions), at<Size>(slot_mapping), at<Int>(block_tables),
                at<Int>(cu_seqlens_q), at<Int>(seq_lens), at<Size>(logit_rows), at(k_cache),
                at(v_cache), at<float>(logits), rows, seqs, max_blocks, num_blocks, block_size,
                num_logits},
               isa, team);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Row-invariant CPU kernels of nudging, and the host half of its ordinary steps.";
  const py::call_guard<py::gil_scoped_release> unlocked;

  py::enum_<Isa>(m, "Isa")
      .value("portable", Isa::portable)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512)
      .value("avx512bf16", Isa::avx512bf16);
  py::enum_<DType>(m, "DType")
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("f16", DType::f16);
  py::enum_<Activation>(m, "Activation")
      .value("silu", Activation::silu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh);
  py::enum_<WeightType>(m, "WeightType")
      .value("f32", WeightType::f32)
      .value("bf16", WeightType::bf16)
      .value("f16", WeightType::f16)
      .value("int8", WeightType::int8);
  m.attr("PANEL") = kLinearPanel;
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.def("available_isas", &available_isas);

  py::class_<Team>(m, "Team").def(py::init<int>()).def_property_readonly("threads", &Team::threads);
  py::class_<Pages>(m, "Pages", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_buffer([](const Pages& pages) {
        return py::buffer_info(static_cast<unsigned char*>(pages.data()),
                               static_cast<Size>(pages.size()));
      });
  bind_decoder(m);
  bind_fast_path(m);

  m.def(
      "linear",
      [](Isa isa, Team& team, DType dtype, DType out_dtype, Address x, Address weight,
         Address scales, Address bias, Address out, Size rows, Size in, Size cols, bool is_packed) {
        linear({at(x), at(weight), at<float>(scales), at(bias), at(out), rows, in, cols, dtype,
                out_dtype, is_packed},
               isa, team);
      },
      unlocked);
  m.def(
      "pack_weight",
      [](Team& team, WeightType type, Address weight, Size in, Size cols) {
        pack_weight(at(weight), type, in, cols, team);
      },
      unlocked);
  m.def(
      "unpack_columns",
      [](WeightType type, Address weight, Size in, Size cols, Address ids, Size count,
         Address out) {
        unpack_columns(at(weight), type, in, cols, at<Size>(ids), count, at(out));
      },
      unlocked);
  m.def(
      "rms_norm",
      [](Isa isa, Team& team, DType dtype, Address x, Address weight, Address out, Size rows,
         Size dim, float eps, bool unit_offset) {
        rms_norm({at(x), nullptr, nullptr, at(weight), at(out), rows, dim, 1, dim, eps, unit_offset,
                  dtype},
                 isa, team);
      },
      unlocked);
  m.def(
      "add_rms_norm",
      [](Isa isa, Team& team, DType dtype, Address x, Address y, Address weight, Address sum,
         Address out, Size rows, Size dim, float eps, bool unit_offset) {
        rms_norm({at(x), at(y), at(sum), at(weight), at(out), rows, dim, 1, dim, eps, unit_offset,
                  dtype},
                 isa, team);
      },
      unlocked);
  m.def(
      "layer_norm",
      [](Isa isa, Team& team, DType dtype, Address x, Address out, Size rows, Size dim, float eps) {
        layer_norm({at(x), at(out), rows, dim, eps, dtype}, isa, team);
      },
      unlocked);
  m.def(
      "rope",
      [](Isa isa, Team& team, DType dtype, Address x, Address positions, Address cos, Address sin,
         Address out, Size rows, Size heads, Size head_dim, Size half, Size max_position) {
        rope({at(x), at<Size>(positions), at<float>(cos), at<float>(sin), at(out), rows, heads,
              head_dim, half, max_position, dtype},
             isa, team);
      },
      unlocked);
  m.def(
      "rope_append",
      [](Isa isa, Team& team, DType dtype, Address q, Address k, Address v, Size q_stride,
         Size k_stride, Size v_stride, Address positions, Address cos, Address sin, Address q_out,
         Address k_cache, Address v_cache, Address slot_mapping, Size rows, Size heads,
         Size kv_heads, Size head_dim, Size half, Size max_position, Size slots) {
        rope_append({at(q),
                     at(k),
                     at(v),
                     q_stride,
                     k_stride,
                     v_stride,
                     at<Size>(positions),
                     at<float>(cos),
                     at<float>(sin),
                     at(q_out),
                     at(k_cache),
                     at(v_cache),
                     at<Size>(slot_mapping),
                     rows,
                     heads,
                     kv_heads,
                     head_dim,
                     half,
                     max_position,
                     slots,
                     dtype},
                    isa, team);
      },
      unlocked);
  m.def(
      "gated_act",
      [](Isa isa, Team& team, DType dtype, Activation activation, Address gate_up, Address out,
         Size rows,
         Size dim) { gated_act({at(gate_up), at(out), rows, dim, activation, dtype}, isa, team); },
      unlocked);
  m.def(
      "soft_cap",
      [](Isa isa, Team& team, DType dtype, Address logits, Address out, Size size, float cap) {
        soft_cap({at(logits), at(out), size, cap, dtype}, isa, team);
      },
      unlocked);
  m.def(
      "kv_append",
      [](Team& team, Address k, Address v, Address k_cache, Address v_cache, Address slot_mapping,
         Size rows, Size row_bytes, Size slots) {
        kv_append({at(k), at(v), at(k_cache), at(v_cache), at<Size>(slot_mapping), rows, row_bytes,
                   slots},
                  team);
      },
      unlocked);
  m.def(
      "paged_attention",
      [](Isa isa, Team& team, DType dtype, Address q, Address k_cache, Address v_cache, Address out,
         Address block_tables, Address cu_seqlens_q, Address seq_lens, Size rows, Size seqs,
         Size heads, Size kv_heads, Size head_dim, Size num_blocks, Size block_size,
         Size max_blocks, float scale, Size window, float soft_cap) {
        using Int = std::int32_t;
        paged_attention(
            {at(q), at(k_cache), at(v_cache), at(out), at<Int>(block_tables), at<Int>(cu_seqlens_q),
             at<Int>(seq_lens), rows, seqs, heads, kv_heads, head_dim, num_blocks, block_size,
             max_blocks, scale, window, soft_cap, dtype},
            isa, team);
      },
      unlocked);
  m.def(
      "softmax_stats",
      [](Isa isa, Team& team, DType dtype, Address logits, Address max, Address lse, Address argmax,
         Address entropy, Size rows, Size vocab) {
        softmax_stats({at(logits), at<float>(max), at<float>(lse), at<std::int32_t>(argmax),
                       at<float>(entropy), rows, vocab, dtype},
                      isa, team);
      },
      unlocked);
}
