"""`python -m clp_jax` is the command `clp`."""

from clp_jax.cli.main import main

if __name__ == "__main__":
  raise SystemExit(main())
