"""The second engine: pure JAX, which agrees with the torch engine on every number that both report.

The only place in the package that imports jax. It shares recipe, data, packs, plan, watchers and run folder; it is
chosen by `backend: jax`.
"""
