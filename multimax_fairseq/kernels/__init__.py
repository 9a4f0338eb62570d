"""Fast versions of the formulas in :mod:`multimax_fairseq.mappings`; :mod:`.backend` chooses what computes.

- PyTorch's compiler (:mod:`.compiler`): functions of rows (:mod:`.rows`), attention in blocks of queries
  (:mod:`.blockwise_attention`) and losses in chunks of tokens (:mod:`.chunked_loss`): :mod:`.chunked_cross_entropy`
  and :mod:`.chunked_entmax_loss`.
- C++, for fp32 on a CPU (:mod:`.cpp`, :mod:`.cpp_attention`, :mod:`.sparse`).
- Triton, for attention on a GPU (:mod:`.triton_attention`).

The other packages call :mod:`.fused`, :mod:`.sparse` and :mod:`.attention`: functions that autograd differentiates.
"""
