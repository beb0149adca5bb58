"""How a Top-K mask is found: one module per implementation, all equal bit for bit.

Contract of every implementation: `mask(x, k, rank_by) -> bool [b, n, c]` for float `x [b, n, c]`
in float32, bfloat16 or float16 and an int32 scalar `1 <= k < n`, traced or not. For every `(b, c)`
exactly `k` of the `n` positions are True: those of largest rank, ties going to the lowest position.
"""
