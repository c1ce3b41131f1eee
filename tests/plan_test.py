"""What `clp plan` counts, against counts by hand, and what it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from benchmarks import plans
from clp_jax import config as config_lib
from clp_jax import demo, sharding
from clp_jax.errors import ConfigError
from clp_jax.models import families, t5
from clp_jax.plan import chips, hlo, programs, roofline

MODEL = t5.T5Config(
  vocab_size=48,
  emb_dim=16,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=3,
  num_decoder_layers=2,
  mlp_dim=24,
  eos_ids=(1,),
)
PROMPTS, SAMPLES, SOURCE, TARGET = 2, 3, 10, 6

# x lies in fast memory, the matrices do not.
STATE = "(s32[], bf16[5,8,16]{2,1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:S(1)})"
LOOPS = """\
HloModule example, is_scheduled=true

%multiply (p0: bf16[5,8,16], p1: s32[], p2: bf16[4,8]) -> bf16[4,16] {
  %p0 = bf16[5,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[4,8]{1,0:S(1)} parameter(2)
  %zero = s32[] constant(0)
  %one = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero)
  %flat = bf16[8,16]{1,0} bitcast(%one)
  ROOT %product = bf16[4,16]{1,0} convolution(%p2, %flat), dim_labels=bf_io->bf
}

%body (state: (s32[], /*index=1*/bf16[5,8,16], bf16[4,8])) -> STATE {
  %state = STATE parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = bf16[5,8,16]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[4,8]{1,0:S(1)} get-tuple-element(%state), index=2
  %fused = bf16[4,16]{1,0} fusion(%all, %i, %x), kind=kOutput, calls=%multiply
  %gathered = bf16[4,64]{1,0} all-gather(%fused), channel_id=1, GROUPS
  ROOT %next = STATE tuple(%i, %all, %x)
}

%condition (state.1: (s32[], bf16[5,8,16], bf16[4,8])) -> pred[] {
  %state.1 = STATE parameter(0)
  %limit = s32[] constant(5)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (start: (s32[], bf16[5,8,16], bf16[4,8])) -> STATE {
  %start = STATE parameter(0)
  ROOT %loop = STATE while(%start), condition=%condition, body=%body
}
""".replace("STATE", STATE).replace(
  "GROUPS", "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}"
)


NESTED = """\
HloModule nested

%layer (p0: bf16[5,8,16], p1: s32[]) -> bf16[8,16] {
  %p0 = bf16[5,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero)
  ROOT %flat = bf16[8,16]{1,0} bitcast(%one)
}

%multiply (p2: bf16[4,8], p3: bf16[5,8,16], p4: s32[]) -> bf16[4,16] {
  %p2 = bf16[4,8]{1,0} parameter(0)
  %p3 = bf16[5,8,16]{2,1,0} parameter(1)
  %p4 = s32[] parameter(2)
  %inner = bf16[8,16]{1,0} fusion(%p3, %p4), kind=kLoop, calls=%layer
  ROOT %product = bf16[4,16]{1,0} convolution(%p2, %inner), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[4,8], all: bf16[5,8,16], i: s32[]) -> bf16[4,16] {
  %x = bf16[4,8]{1,0} parameter(0)
  %all = bf16[5,8,16]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = bf16[4,16]{1,0} fusion(%x, %all, %i), kind=kOutput, calls=%multiply
}
"""


def test_a_slice_in_a_fusion_of_a_fusion_reads_one_layer():
  costs = hlo.count(hlo.parse(NESTED))
  assert costs.flops == 2 * 4 * 8 * 16
  assert costs.bytes == 2 * (4 * 8 + 8 * 16 + 4 * 16) + 4


def test_a_loop_counts_as_often_as_it_runs():
  costs = hlo.count(hlo.parse(LOOPS))
  assert costs.flops == 5 * 2 * 4 * 8 * 16
  # A slice of the matrices, its index and the product; x is in fast memory.
  fused = 8 * 16 * 2 + 4 + 4 * 16 * 2
  gathered = 4 * 16 * 2 + 4 * 64 * 2
  compared = 2 * 4 + 1  # the condition
  assert costs.bytes == 5 * (fused + gathered + compared)
  (collective,) = costs.collectives
  assert collective == hlo.Collective("all-gather", 4 * 64 * 2, (0, 2, 4, 6))
  assert costs.collectives[collective] == 5
  assert costs.unknown_loops == 0
  known = LOOPS.replace(
    "body=%body",
    'body=%body, backend_config={"known_trip_count":{"n":"7"}}',
  )
  assert hlo.count(hlo.parse(known)).flops == 7 * 2 * 4 * 8 * 16
  unknown = LOOPS.replace("constant(5)", "parameter(1)")
  costs = hlo.count(hlo.parse(unknown))
  assert costs.unknown_loops == 1 and costs.flops == 2 * 4 * 8 * 16


@pytest.mark.parametrize(
  "window, labels, lhs, rhs, out, expected",
  [
    # A matrix product, and the same with a batch of 3 as a spatial dimension.
    ("", "bf_io->bf", (4, 8), (8, 16), (4, 16), 4 * 8 * 16),
    (
      "size=3 stride=2 pad=0_0 lhs_dilate=3",
      "0bf_0io->0bf",
      (3, 4, 8),
      (3, 8, 16),
      (3, 4, 16),
      3 * 4 * 8 * 16,
    ),
    # An ordinary convolution: at its edges the window meets 2 of 3 elements.
    (
      "size=3 pad=1_1",
      "b0f_0io->b0f",
      (1, 5, 2),
      (3, 2, 7),
      (1, 5, 7),
      (3 * 5 - 2) * 2 * 7,
    ),
    # One element between paddings: every window of a vocabulary meets it once.
    (
      "size=151936 pad=151935_151935 rhs_reversal=1",
      "fb0_i0o->b0f",
      (3, 2, 1),
      (3, 151936, 8),
      (2, 151936, 8),
      2 * 151936 * 8 * 3,
    ),
  ],
)
def test_products_written_as_convolutions(
  window, labels, lhs, rhs, out, expected
):
  def array(name, shape, rest):
    dims = ",".join(map(str, shape))
    return f"  %{name} = f32[{dims}]{{0}} {rest}\n"

  text = (
    "ENTRY %main () -> f32[] {\n"
    + array("a", lhs, "parameter(0)")
    + array("b", rhs, "parameter(1)")
    + array(
      "c",
      out,
      f"convolution(%a, %b), window={{{window}}}, dim_labels={labels}, "
      "operand_precision={highest,highest}",
    )
    + "}\n"
  )
  costs = hlo.count(hlo.parse(text))
  assert costs.flops == 2 * expected
  assert costs.passes == 6 * 2 * expected


def test_products_of_any_window_are_those_of_a_list():
  random = np.random.default_rng(0)
  for _ in range(500):
    out, window, size, *steps = random.integers(1, 10, 6).tolist()
    stride, dilation, holes = steps
    low = int(random.integers(13))
    at = np.arange(out)[:, None] * stride + np.arange(window) * dilation - low
    met = (at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)
    assert met.sum() == hlo.products_met(
      *(out, window, size),
      stride=stride,
      dilation=dilation,
      holes=holes,
      low=low,
    )


@pytest.mark.parametrize(
  "notation, group",
  [
    ("replica_groups={{1,3},{0,2}}", (1, 3)),
    ("replica_groups=[4,2]<=[8]", (0, 1)),
    ("replica_groups=[2,4]<=[2,2,2]T(2,1,0)", (0, 4, 2, 6)),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
    ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", (0, 1)),
    (
      "replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}",
      (0, 2, 4, 6),
    ),
    ("source_target_pairs={{0,1},{1,6},{6,0}}", (6, 0)),
  ],
)
def test_groups_of_a_collective_in_every_notation(notation, group):
  text = (
    "ENTRY %main () -> f32[] {\n  %a = f32[8]{0} parameter(0)\n"
    f"  ROOT %b = f32[8]{{0}} all-reduce(%a), channel_id=3, {notation}\n}}\n"
  )
  (collective,) = hlo.count(hlo.parse(text)).collectives
  assert collective.group == group and collective.bytes == 32


def compiled_forward(config):
  params = t5.abstract_params(config)
  tokens = [
    jax.ShapeDtypeStruct(shape, jnp.int32)
    for shape in ((PROMPTS, SOURCE), (PROMPTS * SAMPLES, TARGET))
  ]

  def forward(params, source, target):
    return t5.T5(config).apply({"params": params}, source, target)

  return jax.jit(forward).lower(params, *tokens).compile().as_text()


def test_flops_equal_a_hand_count_and_scanning_changes_nothing():
  d, h, f, v = 16, 2 * 4, 24, 48
  source, target = PROMPTS * SOURCE, PROMPTS * SAMPLES * TARGET
  by_hand = 2 * (
    3 * source * (4 * d * h + 3 * d * f + 2 * SOURCE * h)
    + 2 * source * 2 * d * h
    + 2 * target * (6 * d * h + 3 * d * f + 2 * (TARGET + SOURCE) * h)
    + target * d * v
  )
  formula = families.build(MODEL).flops(
    PROMPTS, PROMPTS * SAMPLES, SOURCE, TARGET
  )
  assert formula == by_hand
  scanned = dataclasses.replace(MODEL, scan_layers=True)
  for config in (MODEL, scanned):
    costs = hlo.count(hlo.parse(compiled_forward(config)))
    assert costs.unknown_loops == 0
    assert costs.flops == by_hand


def test_collectives_take_what_their_links_allow():
  slice_ = chips.find_slice("v5e:4x16")  # 16 close to a ring, 4 do not
  places = np.asarray([(x, y) for x in range(4) for y in range(16)])
  rows, columns = tuple(range(16)), tuple(range(0, 64, 16))

  def seconds(kind, group):
    return chips.collective_seconds(slice_, places, kind, 10**9, group)

  assert seconds("all-gather", rows) == pytest.approx(1e9 * 15 / 16 / 100e9)
  assert seconds("all-reduce", rows) == 2 * seconds("all-gather", rows)
  assert seconds("all-gather", columns) == pytest.approx(1e9 * 3 / 4 / 50e9)
  both = tuple(range(64))
  assert seconds("all-gather", both) == pytest.approx(1e9 * 63 / 64 / 150e9)
  assert seconds("all-to-all", rows) == pytest.approx(1e9 * 16 / 400e9)
  assert seconds("all-gather", (3,)) == 0


def example_report(needed=None, whole=True, quick=False, **changes):
  """A report on made-up programs of 2 x 4 chips: an update, and a reward that a
  step calls three times."""
  config = config_lib.get_config()
  config.update_from_flattened_dict(
    {"rollout.prompts": 64, "rollout.weightings": 8} | changes
  )
  slice_ = chips.find_slice("v5e:2x4")

  class Place:
    """Stands for a chip."""

    def __init__(self, number):
      self.coords = [number % 2, number // 2, 0]

  class Mesh:
    """Stands for a mesh of them."""

    shape = {"replica": 1, "data": 8, "model": 1}
    axis_names = tuple(shape)
    devices = np.asarray([Place(i) for i in range(8)], object)

  costs = hlo.Costs(flops=1e12, passes=1e12, bytes=8e9)
  costs.busy = [(1e12, 1e9, 1.0), (0.0, 7e9, 1.0)]
  costs.collectives[hlo.Collective("all-gather", 8 * 10**8, range(8))] = 2.0
  job = programs.Job(
    "update", None, (), 1, 4e12, {"parameters": 10**9, "optimizer": 2 * 10**9}
  )
  compiled = programs.Compiled(
    job, None if needed or quick else costs, 5 * 10**9, 10**6, needed, 1.0
  )
  reward = compiled._replace(
    job=job._replace(name="reward nli", calls=3, useful=1e12),
    costs=hlo.Costs(flops=2e11, passes=2e11, bytes=1e9),
    needed=None,
  )
  reward.costs.busy = [(2e11, 1e9, 1.0)]
  return roofline.make_report(config, slice_, Mesh, [compiled, reward], whole)


def test_the_report_draws_a_roofline_and_names_the_bottleneck():
  result = example_report(**{"train.steps": 250})
  program, reward = result["programs"]
  time = program["time"]
  assert time["compute_bound"] == pytest.approx(1e12 / 197e12)
  assert time["hbm_bound"] == pytest.approx(7e9 / 819e9)
  links = 2 * 8e8 * 7 / 8 / 100e9  # neither 2 nor 4 chips close to a ring
  assert time["interconnect"] == pytest.approx(links)
  assert time["step"] == pytest.approx(max(1e12 / 197e12 + 7e9 / 819e9, links))
  assert program["bottleneck"] == "interconnect"
  assert program["utilisation"] == pytest.approx(
    4e12 / (8 * 197e12 * time["step"])
  )
  assert program["total_bytes"] == 8 * 10**9 + 10**6 and result["fits"]
  text = roofline.to_text(result)
  assert "It fits." in text and "interconnect" in text
  json.dumps(result)
  # The whole step: 64 prompts of 4 samples on 8 chips, 250 times.
  seconds = time["step"] + 3 * reward["time"]["step"]
  assert reward["time"]["step"] == pytest.approx(1e9 / 819e9)
  step = result["step"]
  assert step["seconds"] == pytest.approx(seconds)
  assert step["utilisation"] == pytest.approx(7e12 / (8 * 197e12 * seconds))
  assert step["responses_per_second"] == pytest.approx(256 / 8 / seconds)
  assert step["chip_hours"] == pytest.approx(250 * 8 * seconds / 3600)
  (line,) = [x for x in text.splitlines() if x.startswith("a step ")]
  assert line.split()[2:5] == ["1.60", "7", "in"]  # TFLOP, useful
  assert f"{1e3 * seconds:.1f}" in line and f"{step['utilisation']:.1%}" in line


def test_a_step_is_not_summed_from_some_of_its_programs():
  for result in (example_report(whole=False), example_report(needed=2e10)):
    assert set(result["step"].values()) == {None}
    text = roofline.to_text(result)
    assert "\na step" not in text and "A training step" not in text


def test_a_quick_plan_has_what_is_held_and_no_times():
  whole, quick = example_report(), example_report(quick=True)
  program, held = (report["programs"][0] for report in (whole, quick))
  assert held["total_bytes"] == program["total_bytes"]
  assert held["bytes"] == program["bytes"] and quick["fits"]
  assert held["time"] is None and "hbm_bytes" not in held
  assert set(quick["step"].values()) == {None} and not quick["advice"]
  text = roofline.to_text(quick)
  assert "8.00" in text and "It fits." in text and "A training step" not in text
  assert not example_report(quick=True, needed=3e10)["fits"]


def test_what_does_not_fit_is_told_what_to_change():
  result = example_report(needed=30e9)
  assert not result["fits"]
  advice = "\n".join(result["advice"])
  for change in (
    "--config.model.remat=full",
    "--config.train.microbatches=2",
    "--mesh data=4,model=2",
    "--config.optimizer.name=adafactor",
  ):
    assert change in advice
  done = example_report(
    30e9, **{"model.remat": "full", "optimizer.name": "adafactor"}
  )
  assert "remat" not in "\n".join(done["advice"])
  assert "It does not fit" in roofline.to_text(result)


@pytest.mark.parametrize(
  "name", ["v5e", "v7:2x2", "v5e:2x2x2", "v5p:4x4", "v5e:0x4", "v5e:axb", ""]
)
def test_an_unknown_topology_is_refused(name):
  with pytest.raises(ConfigError, match="unknown topology .* such as v4:4x4x4"):
    chips.find_slice(name)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'clp_jax\[plan\]'"):
    chips.devices(chips.find_slice("v5e:2x2"))


def plan(*arguments):
  return runs.clp("plan", "--config", runs.CONFIG, *arguments)


def test_errors_are_one_line():
  status, out, err = plan("--topology", "v5e:2")
  assert (status, out) == (2, "") and len(err.splitlines()) == 1
  status, _, err = plan("--topology", "v5e:2x2", "--mesh", "data=3")
  assert status == 2 and "mesh data=3 x model=1 does not fit 4 devices" in err
  assert len(err.splitlines()) == 1
  status, _, err = plan("--topology", "v5e:2x2", "--mesh", "rows=3")
  assert status == 2 and "expected data=D,model=M" in err
  status, _, err = plan("--topology", "v5e:3x2")
  assert status == 2 and "topology v5e:3x2" in err
  assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
  "name, chips_", [("v4:2x2x1", 4), ("v5p:2x2x2", 8), ("v6e:4x4", 16)]
)
def test_a_slice_has_a_device_a_chip(name, chips_):
  pytest.importorskip("libtpu")
  slice_ = chips.find_slice(name)
  found = chips.devices(slice_)
  assert len(found) == slice_.chips == chips_
  places = {tuple(d.coords) for d in found}
  assert len(places) == chips_
  # Rows of a process lie side by side.
  mesh = sharding.make_mesh(model=2, devices=found)
  processes = [d.process_index for d in mesh.devices.flat]
  assert processes == sorted(processes)


def test_a_program_is_compiled_for_a_tpu_and_counted():
  pytest.importorskip("libtpu")
  mesh = sharding.make_mesh(
    4, devices=chips.devices(chips.find_slice("v5e:2x2"))
  )
  rows, whole = sharding.row_sharding(mesh), sharding.replicated(mesh)

  def multiply(x, matrices):
    return jax.lax.scan(lambda x, m: (jnp.tanh(x @ m), None), x, matrices)[0]

  x = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
  matrices = jax.ShapeDtypeStruct((6, 256, 256), jnp.bfloat16)
  job = programs.Job(
    "rollout",
    jax.jit(multiply, in_shardings=(rows, whole), out_shardings=rows),
    (x, matrices),
    1,
    6 * 2 * 512 * 256 * 256,
    {"parameters": 6 * 256 * 256 * 2},
  )
  compiled = programs.compile_job(job)
  assert compiled.costs.flops == job.useful / 4
  assert compiled.costs.unknown_loops == 0
  quick = programs.compile_job(job, quick=True)
  assert quick.costs is None and quick.needed is None
  assert quick.results == compiled.results
  assert 0 <= quick.temporary <= 512 * 256 * 2  # at most x of all chips


def test_a_chat_model_is_planned_without_data():
  pytest.importorskip("libtpu")
  status, _, err = runs.clp(
    *("plan", "--config", "configs/chat/qwen3_0_6b.py"),
    *("--topology", "v5e:2x4", "--only", "data"),
  )
  assert status == 2 and err.splitlines()[-1] == (
    "clp plan: error: --only data: the config's programs are rollout, "
    "reference, reward helpful, update."
  )


@pytest.mark.slow
@pytest.mark.parametrize("run", [r for x in plans.RUNS.values() for r in x])
def test_runs_of_the_plans_page_fit_their_slices_in_rows_and_heads(run):
  pytest.importorskip("libtpu")
  status, _, err = runs.clp(
    *("plan", "--config", run.config, "--topology", run.topology),
    *(*run.options, "--only", "nothing"),
  )
  assert status == 2 and "the config's programs are " in err, err


def test_rows_of_the_plans_page_are_those_of_the_report():
  run = plans.Run("a run", "a.py", "v5e:2x4")
  report = example_report(**{"train.steps": 250})
  with pytest.raises(ValueError):
    plans.step_row(run, report)  # none of its programs samples
  report["programs"][1]["name"] = "rollout"
  update, rollout = plans.program_rows(run, report)
  assert update[:3] == ["a run", "v5e:2x4", "update"]
  assert len(update) == len(rollout) == len(plans.PROGRAMS)
  assert update[8:] == [
    *(1e3 * report["programs"][0]["time"][k] for k in ("interconnect", "step")),
    *(report["programs"][0][k] for k in ("utilisation", "bottleneck")),
  ]
  row = dict(zip(plans.STEPS, plans.step_row(run, report), strict=True))
  assert row["steps"] == pytest.approx(250) and row["fits"] == "yes"
  assert row["step ms"] == pytest.approx(1e3 * report["step"]["seconds"])
  assert row["of it rollout"] == pytest.approx(
    report["programs"][1]["time"]["step"] / report["step"]["seconds"]
  )
  too_large = example_report(needed=2e10)
  assert plans.step_row(run, too_large)[3:] == ["no", *[None] * 6]
  assert plans.program_rows(run, too_large)[0][4:] == ["no", *[None] * 7]


def test_adapters_are_planned_beside_whole_sets_of_the_same_run():
  runs_ = plans.RUNS["adapters"]
  for full, lora in zip(runs_[::2], runs_[1::2], strict=True):
    assert (full.config, full.topology) == (lora.config, lora.topology)
    assert full.topology.startswith("v5e:")
    changed = set(full.options) ^ set(lora.options)
    assert changed == {"--config.steering=full", "--config.steering=lora"}
    assert full.name != lora.name  # which are those of the files
  assert [run.config for run in runs_[::2]] == [
    *("configs/xsum/xl.py", "configs/chat/qwen3_8b.py")
  ]


def test_what_programs_hold_has_a_column_each_and_no_times():
  run = plans.Run("a run", "a.py", "v5e:2x4", ("--quick",))
  quick = example_report(quick=True)
  sizes = [program["total_bytes"] / 1e9 for program in quick["programs"]]
  assert plans.held_row(run, quick) == ["a run", "v5e:2x4", *sizes, "yes"]
  assert plans.held_row(run, example_report(needed=2e10))[-1] == "no"
  for name in ("chat", "colab", "growth"):
    assert all("--quick" in run.options for run in plans.RUNS[name])
  timed = [*plans.RUNS["adapters"], *plans.RUNS["chat-steps"]]
  assert not any("--quick" in run.options for run in timed)


def test_memory_of_adapters_is_told_program_by_program():
  full, lora = example_report(needed=8e9), example_report(needed=2e9)
  names = [program["name"] for program in full["programs"]]
  run = plans.Run("xl, full, m = 3", "a.py", "v5e:2x4")
  rows = plans.memory_rows(run, full, lora)
  assert [row[:3] for row in rows] == [["xl", "v5e:2x4", n] for n in names]
  for row, one, other in zip(
    rows, full["programs"], lora["programs"], strict=True
  ):
    sizes = [one["total_bytes"], other["total_bytes"]]
    assert row[3:] == [sizes[0] / 1e9, sizes[1] / 1e9, sizes[1] / sizes[0]]
  assert rows[0][-1] < 1
  with pytest.raises(ValueError, match="shorter|longer"):
    plans.memory_rows(run, full, lora | {"programs": []})


def test_responses_that_are_sampled_ahead_are_counted():
  config = demo.get_config()
  config.model.init, config.sft.steps, config.algorithm = "micro", 0, "ppo"

  def held(ahead):
    config.rollout.ahead = ahead
    jobs = programs.jobs(config, sharding.make_mesh(4, 2))
    return {job.name: job.held for job in jobs}

  length, (prompts, samples, groups) = config.data.target_length, (16, 4, 4)
  # Tokens, mask and two log-probabilities, documents, and of the weightings two
  # weights, an alpha and two coefficients, on every device.
  size = prompts * samples * length * (4 + 1 + 4 + 4) // 4
  size += prompts * config.data.source_length * 4 // 4 + groups * 5 * 4
  for name, kinds in held(1).items():
    assert kinds["pending rollout"] == size, name
  assert all("pending rollout" not in kinds for kinds in held(0).values())


@pytest.mark.slow
def test_the_demo_is_planned_from_the_shell():
  pytest.importorskip("libtpu")
  status, out, err = plan(
    *("--topology", "v5e:2x2", "--mesh", "data=2,model=2", "--json")
  )
  assert status == 0, err
  assert "compiling update for v5e:2x2 (4 of 4" in err
  result = json.loads(out)
  assert [p["name"] for p in result["programs"]] == [
    "sft",
    "rollout",
    "reference",
    "update",
  ]
  assert result["fits"] and 0 < result["step"]["utilisation"] < 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_weightings_of_a_step():
  """Up to the data axis: each shard then holds one policy, whatever G is."""

  def temporary(weightings):
    config = config_lib.get_config()
    config.rollout.prompts, config.rollout.samples = 8, 2
    config.rollout.weightings = weightings
    config.data.source_length, config.data.target_length = 8, 4
    config.objectives = ("rouge", "length")
    config.rewards.length = config_lib.reward("length")
    model = dataclasses.replace(
      MODEL,
      emb_dim=64,
      head_dim=32,
      mlp_dim=256,
      num_encoder_layers=1,
      num_decoder_layers=1,
    )
    return update_memory(config, model, sharding.make_mesh(8))

  sizes = {weightings: temporary(weightings) for weightings in (1, 2, 8)}
  # A policy more than with a single weighting, whose gradient needs no sum
  # over weightings; 8 policies on every device would be several times that.
  assert sizes[8] < 1.05 * sizes[2], sizes
  assert sizes[8] < 1.5 * sizes[1], sizes


@pytest.mark.slow
def test_no_device_computes_what_another_one_does():
  """FLOPs of rollout, reference, which knows of no weightings, and of the
  update, which makes nothing twice without remat."""
  config = config_lib.get_config()
  config.rollout.prompts, config.rollout.samples = 16, 2
  config.rollout.weightings = 4
  config.data.source_length, config.data.target_length = 32, 4
  config.objectives = ("rouge", "length")
  config.rewards.length = config_lib.reward("length")
  config.mesh.fsdp = True
  model = dataclasses.replace(MODEL, emb_dim=64, head_dim=32, mlp_dim=128)
  programs = step_programs(config, model, sharding.make_mesh(4, 2))
  forward = families.build(model).flops(16, 32, 32, 4)
  for compiled, passes in zip(programs, (1, 1, 3), strict=True):
    costs = hlo.count(hlo.parse(compiled.as_text()))
    assert passes * forward <= 8 * costs.flops < 1.2 * passes * forward


def update_memory(config, model, mesh):
  """Bytes a device beside arguments and results, of the update's program."""
  *_, update = step_programs(config, model, mesh)
  return update.memory_analysis().temp_size_in_bytes


def step_programs(config, model, mesh):
  """(rollout, reference, update), compiled on shapes alone."""
  from clp_jax.train import moft

  allowed = np.arange(model.vocab_size) > 0
  made = moft.make_programs(config, model, mesh, allowed)
  key = jax.eval_shape(lambda: jax.random.key(0))
  reference = t5.abstract_params(model)
  state = jax.eval_shape(made.init, reference, key)
  rows = config.rollout.prompts * config.rollout.samples
  prompts = jax.ShapeDtypeStruct(
    (config.rollout.prompts, config.data.source_length), jnp.int32
  )
  number = jax.ShapeDtypeStruct((), jnp.int32)
  rollout = jax.eval_shape(
    made.scored_rollout, state, reference, prompts, number
  )
  rewards = jax.ShapeDtypeStruct((rows, 2), jnp.float32)
  lowered = (
    made.rollout.lower(
      state.params, reference, prompts, key, number, state.front
    ),
    made.reference.lower(reference, prompts, rollout.tokens, rollout.mask),
    made.update.lower(state, rollout, rewards, reference),
  )
  return [program.compile() for program in lowered]
