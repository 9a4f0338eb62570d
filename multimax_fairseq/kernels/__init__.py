"""Fast versions of the formulas in :mod:`multimax_fairseq.mappings`; :mod:`.backend` chooses what computes.

- PyTorch's compiler (:mod:`.compiler`): functions of rows (:mod:`.rows`) and losses in chunks of tokens
  (:mod:`.loss`).
- C++, for fp32 on a CPU (:mod:`.cpp`, :mod:`.cpp_attention`, :mod:`.sparse`).
- Triton, for attention on a GPU (:mod:`.triton_attention`); elsewhere plain PyTorch (:mod:`.blockwise_attention`).

The other packages call :mod:`.fused`, :mod:`.sparse` and :mod:`.attention`: functions that autograd differentiates.
"""
