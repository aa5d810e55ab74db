"""Gluon under one set of names for Triton 3.6 to 3.9.

3.9 renamed what this kernel uses: `async_copy_global_to_shared` of `tma` and `async_copy` is `async_load`,
`tma.async_copy_shared_to_global` is `tma.async_store`, `gl.thread_barrier` (3.6) is `gl.barrier`, and a shared-memory view's
`_reinterpret` is `reinterpret`. The old names raise there.
"""

from triton.experimental import gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import async_copy as async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared as fence_async_shared
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as mbarrier
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as warpgroup_mma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as TensorDescriptor

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
copy_to_shared = (
    async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
)
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@builtin
def view_as(buffer, dtype, shape, layout, _semantic=None):
    """The same shared memory seen with another element type, shape and layout."""
    shape = [gl._unwrap_if_constexpr(n) for n in gl._unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(
        buffer, gl._unwrap_if_constexpr(dtype), shape, gl._unwrap_if_constexpr(layout)
    )
