"""How the loops of the numba CRF are compiled, and where the compiled code is kept.

Writes numba's cache: to ``NUMBA_CACHE_DIR``, else to ``__pycache__`` beside the module, else to the user's cache
folder.  An entry is valid for one source file, one version of numba and one kind of processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def compiled(function: FunctionT) -> FunctionT:
    """Compile a function for one thread on its first call, or load what an earlier process compiled.

    Where no cache folder can be written, each process compiles for itself.  A function may call compiled functions of
    its own file only: numba knows a cached function as stale by that file alone.
    """
    # a product may join the sum that it is for (fma); the order of sums stays, so equal inputs give equal bytes
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return cast(FunctionT, numba.njit(function, cache=True, **options))
    except RuntimeError:  # "cannot cache function: no locator available"
        return cast(FunctionT, numba.njit(function, **options))
