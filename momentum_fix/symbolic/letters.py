"""The letters that formulas are written with.

m, p, alpha, delta and tau lie in [0, 1], and q in (0, 1); h, s, t and epsilon are positive, and V, V' and v are not
negative; k and n are 1, 2, and so on, and j and N may also be 0; all others are real numbers.
"""

import sympy as sp

# q is a decay, and so is exp(-h), whose limits SymPy knows.
UNIT = m, p, alpha, delta, tau = sp.symbols("m p alpha delta tau", nonnegative=True)
q, h, s, t = sp.symbols("q h s t", positive=True)
k, n = sp.symbols("k n", integer=True, positive=True)
j, N = sp.symbols("j N", integer=True, nonnegative=True)
old, x0, b, c, w = sp.symbols("R R_0 b c w", real=True)
x = sp.IndexedBase("x")  # x[1], x[2], ...: the statistics of the batches, whatever they are
LETTERS = (*UNIT, q, h, s, t, k, n, j, N, old, x0, b, c, w, x.label)
