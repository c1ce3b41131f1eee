"""Training steps: tokens a second, next to transformers; what steering costs.

    python -m benchmarks.update [--family t5] [--size small] [--batch 32]
      [--source 256] [--target 64] [--dtype float32] [--remat none]
      [--steering none,full,attention] [--rank 8] [--n 3] [--json]

"supervised" is one step of Adam on the cross-entropy of `target` tokens, the
peer's is torch's AdamW on the same batch. "reinforce, ..." are updates of a run
on `batch` samples, four a prompt, under four weightings: of a single-objective
policy, and of policies that steer three rewards. Rewards are given, so that
what is timed is the update's program alone; "GB" is what it holds while it
runs, the optimizer's state too, and the reference where it reads that, as the
base of adapters; "times" and "memory times" are to the first of them. Adapters
beside whole sets:

    python -m benchmarks.update --only reinforce --steering full,lora

"share of rate" is the FLOPs of forward and backward pass, of the matrix rate
measured just before. For an accelerator:

    python -m benchmarks.update --size large --dtype bfloat16 --batch 64
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks import models, timing
from clp_jax import build, sharding
from clp_jax import config as config_lib
from clp_jax.cli import setup
from clp_jax.models import families
from clp_jax.models.families import Config
from clp_jax.rollout import Rollout
from clp_jax.train import moft, sft
from clp_jax.train.optimizer import make_optimizer
from clp_jax.train.state import TrainState, init_state

SAMPLES, WEIGHTINGS = 4, 4
STEERINGS = {  # name of a row, and number of rewards
  "none": ("single-objective", 1),
  "full": ("full-CLP, m = 3", 3),
  "attention": ("attn-CLP, m = 3", 3),
  "lora": ("LoRA-CLP, m = 3", 3),
}


def supervised(config, params, source, target):
  """A function that takes one supervised step after the other."""
  model = families.build(config)
  optimizer = make_optimizer(
    name="adam",
    learning_rate=1e-4,
    warmup_steps=0,
    decay_steps=None,
    clip_norm=1.0,
  )
  update = jax.jit(
    lambda state: sft.update(
      state, source, target, model=model, optimizer=optimizer
    ),
    donate_argnums=0,
  )
  copies = jax.tree.map(lambda p: p.copy(), params)  # the state is donated
  held = [init_state(copies, optimizer, jax.random.key(0))]

  def step():
    held[0], metrics = update(held[0])
    return metrics

  return step


def reinforce(config, params, args, steering, num_rewards):
  """A function that takes one policy-gradient update after the other, and the
  bytes that its program holds."""
  update, state, arguments = reinforce_program(
    config, params, args, steering, num_rewards, WEIGHTINGS
  )
  compiled = update.lower(state, *arguments).compile()
  held = [state]

  def step():
    held[0], metrics = compiled(held[0], *arguments)
    return metrics

  return step, timing.held_bytes(compiled)


def reinforce_program(
  config: Config,
  params: Any,
  args: argparse.Namespace,
  steering: str,
  num_rewards: int,
  weightings: int,
) -> tuple[Any, TrainState, tuple]:
  """A run's jitted update, its state, which is donated, and what else the
  update takes: a rollout, rewards, and the reference."""
  c = config_lib.get_config()
  c.steering = steering
  if steering == "lora":
    c.adapters.rank = args.rank
  c.objectives = tuple(f"reward{i}" for i in range(num_rewards))
  c.rewards = {name: config_lib.reward("length") for name in c.objectives}
  if num_rewards == 1:
    c.weightings.weights = (1.0,)
  c.rollout.prompts = args.batch // SAMPLES
  c.rollout.samples = SAMPLES
  c.rollout.weightings = min(weightings, c.rollout.prompts)
  c.optimizer.learning_rate = 1e-4
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  programs = moft.make_programs(c, config, mesh, models.allowed(config))
  rng = np.random.default_rng(0)
  rows = (args.batch, args.target)
  distribution = build.distribution(c)
  weighting = distribution.sample(jax.random.key(1), c.rollout.weightings)
  logp = rng.normal(-3, 1, rows).astype(np.float32)
  rollout = Rollout(
    encoder_input_tokens=models.random_tokens(
      c.rollout.prompts, args.source, config
    ),
    tokens=models.random_tokens(*rows, config),
    mask=np.ones(rows, bool),
    logp=logp,
    ref_logp=logp,
    weighting=weighting,
    coefficients=distribution.coefficients(weighting),
  )
  rewards = rng.normal(0, 1, (args.batch, num_rewards)).astype(np.float32)
  state = programs.init(params, jax.random.key(0))
  return programs.update, state, (rollout, rewards, params)


def peer_step(peer, source, target):
  """A function that takes one supervised step after the other in torch."""
  inputs, labels = peer.tensor(source), peer.tensor(target)
  model = peer.model.train()
  optimizer = peer.torch.optim.AdamW(
    model.parameters(), lr=1e-4, weight_decay=0.0
  )

  def step():
    optimizer.zero_grad(set_to_none=True)
    _, loss = peer.score(inputs, labels)
    loss.backward()
    peer.torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    peer.wait()

  return step


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  models.add_arguments(parser, batch=32, source=256, target=64)
  parser.add_argument(
    "--remat", choices=("none", "minimal", "full"), default="none"
  )
  parser.add_argument(
    "--only",
    choices=("supervised", "reinforce"),
    help="leave the others out",
  )
  parser.add_argument(
    "--steering",
    type=lambda x: x.split(","),
    default="none,full,attention",
    help=f"of reinforce, some of {','.join(STEERINGS)}; the first is what the\n"
    "others are compared with (default: none,full,attention)",
  )
  timing.add_rank(parser)
  timing.add_arguments(parser, n=3)
  args = models.parse(parser)
  if args.batch % (SAMPLES * WEIGHTINGS):
    parser.error(f"--batch must be a multiple of {SAMPLES * WEIGHTINGS}.")
  if unknown := [x for x in args.steering if x not in STEERINGS]:
    parser.error(
      f"--steering must be some of {','.join(STEERINGS)}, got "
      f"{','.join(unknown)}."
    )
  return args


def main() -> None:
  """Runs the benchmark."""
  args = _arguments()
  setup.configure()
  config = dataclasses.replace(models.config_of(args), remat=args.remat)
  params = models.random_params(config)
  table = []
  tokens = args.batch * (args.source + args.target)
  rates = timing.measure_rates(args.dtype)

  def share(times, sources):
    work = families.build(config).flops(
      sources, args.batch, args.source, args.target
    )
    return {"share of rate": 3 * work / times.median / rates.flops}

  if args.only != "reinforce":
    source = models.random_tokens(args.batch, args.source, config)
    target = models.random_tokens(args.batch, args.target, config)
    ours = "supervised, clp_jax"
    runs = {ours: supervised(config, params, source, target)}
    name = None
    if models.has_peer(args):
      peer = models.Peer(config, params, source=args.source, target=args.target)
      name = f"supervised, {peer.name}"
      runs[name] = peer_step(peer, source, target)
    times = timing.take_turns(runs, args.n)
    table += [
      timing.row(
        n,
        times[n],
        tokens=tokens,
        against=times[name] if n == ours and name else None,
        **models.describe(args),
        **(share(times[n], args.batch) if n == ours else {}),
      )
      for n in runs
    ]
  if args.only != "supervised":
    runs, sizes = {}, {}
    for steering in dict.fromkeys(args.steering):
      name, num_rewards = STEERINGS[steering]
      name = f"reinforce, {name}"
      runs[name], sizes[name] = reinforce(
        config, params, args, steering, num_rewards
      )
    times = timing.take_turns(runs, args.n)
    first = next(iter(runs))
    for name in runs:
      row = timing.row(
        name,
        times[name],
        tokens=args.batch // SAMPLES * args.source + args.batch * args.target,
        **models.describe(args),
        **share(times[name], args.batch // SAMPLES),
        GB=sizes[name] / 1e9,
      )
      if name != first:
        row |= timing.multiple(times[name], times[first])
        row["memory times"] = sizes[name] / sizes[first]
      table.append(row)
  timing.show(table, args, rates)


if __name__ == "__main__":
  main()
