"""The prefill and decode kernels for Hopper GPUs in Gluon: TMA, wgmma and warp specialisation. docs/hopper.md explains them."""
