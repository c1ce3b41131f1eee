"""The notebook for Colab: it runs from top to bottom."""

import ast
import copy
import importlib
import pathlib

import nbclient
import nbformat
import pytest
import small_decoder

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"


def read():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  return notebook, [c for c in notebook.cells if c.cell_type == "code"]


def test_cells_compile_import_what_there_is_and_hold_no_outputs():
  notebook, cells = read()
  nbformat.validate(notebook)
  for cell in cells:
    assert not cell.outputs and cell.execution_count is None
    for node in ast.walk(ast.parse(cell.source)):
      match node:
        case ast.ImportFrom(module=str(name), names=names):
          if name.startswith("clp_jax"):
            module = importlib.import_module(name)
            for alias in names:
              assert hasattr(module, alias.name) or importlib.import_module(
                f"{name}.{alias.name}"
              )
  install = next(c.source for c in cells if c.id == "install")
  assert str(NOTEBOOK.relative_to(ROOT).parent) in install
  assert NOTEBOOK.name in install


@pytest.mark.slow
def test_it_trains_shows_the_front_and_steers(tmp_path):
  notebook, cells = read()
  (settings,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
  tiny = {
    "WORKDIR": str(tmp_path / "run"),
    **{"SFT_STEPS": 4, "STEPS": 2, "GRID": 3, "PROMPTS": 8},
  }
  settings.source += "".join(f"\n{k} = {v!r}" for k, v in tiny.items())
  (chat,) = [c for c in cells if c.id == "chat-settings"]
  chat.source += (
    f"\nCHAT_WORKDIR = {str(tmp_path / 'chat')!r}\n"
    "CHAT_SFT_STEPS, CHAT_STEPS = 4, 2"
  )
  # Once more, with the instruct model of a folder.
  small_decoder.save(tmp_path / "instruct")
  again = copy.deepcopy(cells[cells.index(chat) :])
  for cell in again:
    cell.id = f"{cell.id}-again"
  again[0].source += (
    f"\nCHAT_MODEL = {str(tmp_path / 'instruct')!r}\n"
    f"CHAT_WORKDIR = {str(tmp_path / 'instructed')!r}"
  )
  notebook.cells += again
  cells += again
  nbclient.NotebookClient(
    notebook,
    timeout=1200,
    kernel_name="python3",
    resources={"metadata": {"path": str(NOTEBOOK.parent)}},
  ).execute()

  def result(name):
    (cell,) = [c for c in cells if c.id == name]
    return cell.outputs[-1]

  assert result("train").data["text/plain"] == "2"
  assert result("front").data["image/png"]
  assert isinstance(ast.literal_eval(result("steer").data["text/plain"]), str)
  models = {"": "tiny-decoder", "-again": str(tmp_path / "instruct")}
  for which, model in models.items():
    config = result(f"chat-config{which}").data["text/plain"]
    assert ast.literal_eval(config) == model
    assert result(f"chat-train{which}").data["text/plain"] == "2"
    assert result(f"chat-front{which}").data["image/png"]
  objectives = {
    **{"compare": "rouge", "chat-steer": "helpful"},
    "chat-steer-again": "helpful",
  }
  for name, objective in objectives.items():
    (cell,) = [c for c in cells if c.id == name]
    printed = "".join(o.text for o in cell.outputs if o.name == "stdout")
    assert [line.split("  ")[1] for line in printed.splitlines()[-5:]] == [
      f"{objective} {w:4.2f}" for w in (0, 0.25, 0.5, 0.75, 1)
    ]
