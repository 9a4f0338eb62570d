"""The formulas of :mod:`multimax_fairseq.mappings` again, fast.

:mod:`.backend` says which of these computes; nobody who only wants to know what is computed has to read on here.

- By PyTorch's compiler (:mod:`.compiler`): functions of rows (:mod:`.rows`), attention in blocks of queries
  (:mod:`.blockwise_attention`) and losses in chunks of tokens (:mod:`.chunked_loss`): :mod:`.chunked_cross_entropy`
  and :mod:`.chunked_entmax_loss`.
- In C++, for fp32 on a CPU (:mod:`.cpp`, :mod:`.cpp_attention`, :mod:`.sparse`).
- In Triton, attention on a GPU (:mod:`.triton_attention`).

:mod:`.fused`, :mod:`.sparse` and :mod:`.attention` are what the other rooms call: functions of tensors that autograd
differentiates.
"""
