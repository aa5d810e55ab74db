"""The prefill kernel for Hopper GPUs in Gluon: TMA, wgmma and warp specialisation. docs/hopper.md explains it."""
