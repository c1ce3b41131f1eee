"""API pages of every module: `python docs/render.py build/docs`."""

import pathlib
import pkgutil
import sys

import pdoc

import clp_jax


def main() -> None:
  """Renders them into the folder that the command line names."""
  # pdoc shows what __all__ names and what is there: names that are imported on
  # first use are not, until then, and `import *` needs no modules.
  for name in clp_jax.__all__:
    setattr(clp_jax, name, getattr(clp_jax, name))
  modules = [module.name for module in pkgutil.iter_modules(clp_jax.__path__)]
  for name in modules:
    if name not in (*clp_jax.__all__, "__main__"):
      clp_jax.__all__.append(name)
  pdoc.pdoc("clp_jax", output_directory=pathlib.Path(sys.argv[1]))


if __name__ == "__main__":
  main()
