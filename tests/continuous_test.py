"""Rows that join a batch under way: their numbers, their slots, their turns."""

import asyncio
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from both_families import (
  DECODER,
  LISTED_DECODER,
  SCANNED_T5,
  T5,
  reference,
  with_padding,
)
from servers import make_decoder

import clp_jax
from clp_jax.models import families
from clp_jax.serving.batcher import TOGETHER, Batcher, Unavailable
from clp_jax.serving.decoder import Row, Sampled

ALL = pytest.mark.parametrize(
  "config",
  [T5, SCANNED_T5, DECODER, LISTED_DECODER],
  ids=["t5", "t5-scanned", "decoder-scanned", "decoder"],
)


@ALL
def test_a_position_of_its_own_gives_a_row_the_logits_of_all_at_it(config):
  model, params = families.build(config), reference(config)
  length, behind = 7, np.asarray([0, 2, 3])
  prompts = with_padding(config, [[2, 3, 4, 5], [6, 7, 0, 0], [8, 9, 2, 0]])
  tokens = np.random.default_rng(0).integers(2, 14, (3, length + 1))
  tokens[:, 0] = 0  # not read by a decoder, and T5's first
  context = jax.jit(model.read)(params, prompts)
  step = jax.jit(model.step)
  cache = model.empty_cache(3, length)
  expected = []
  for position in range(length):
    last = tokens[:, position].astype(np.int32)
    logits, cache = step(params, context, cache, last, jnp.int32(position))
    expected.append(logits)
  cache = model.empty_cache(3, length)
  for now in range(length + behind.max()):
    # Those behind begin later; those that are through stay at the length.
    position = np.clip(now - behind, 0, length).astype(np.int32)
    last = tokens[np.arange(3), position].astype(np.int32)
    logits, cache = step(params, context, cache, last, position)
    for row, at in enumerate(position):
      if 0 <= now - behind[row] < length:
        np.testing.assert_allclose(
          logits[row], expected[at][row], rtol=1e-5, atol=1e-5
        )


@pytest.fixture(
  scope="module",
  params=[
    ("tiny", False),
    ("tiny-decoder", True),
    pytest.param(("tiny", True), marks=pytest.mark.slow),
    pytest.param(("tiny-decoder", False), marks=pytest.mark.slow),
  ],
  ids=lambda p: f"{p[0]}-{'scanned' if p[1] else 'listed'}",
)
def policy(request, tmp_path_factory):
  """Random sets; documents are read in two lengths."""
  preset, scanned = request.param
  folder = tmp_path_factory.mktemp("joining") / "run"
  fields = {"data.source_length": 128, "data.target_length": 12}
  runs.make_run(folder, preset, **fields, **{"model.scan_layers": scanned})
  return clp_jax.Policy.load(str(folder))


@pytest.fixture(scope="module")
def decoder(policy):
  made = make_decoder(policy)
  assert made.lengths == [64, 128]
  return made


def make_row(policy, i):
  """One of many that differ in all that rows differ in."""
  random = np.random.default_rng(i)
  w = random.random()
  return Row(
    tokens=random.integers(2, 200, random.integers(5, 128)).astype(np.int32),
    coefficients=policy.coefficients({"nli": w, "rouge": 1 - w}),
    seed=i,
    number=i % 3,
    temperature=float(random.choice([0.0, 0.7, 1.0])),
    top_p=float(random.choice([0.9, 1.0])),
    max_tokens=12 if i % 4 == 0 else int(random.integers(1, 12)),
    alternatives=i % 2 == 1,
  )


def answer(sampled, slot):
  """All that a row is told, as lists."""
  length = int(sampled.lengths[slot])
  return [x[slot, :length].tolist() for x in (*sampled[:2], *sampled[4:])]


def alone(decoder, row):
  found = answer(decoder.begin([row]).advance(decoder.max_tokens), 0)
  return found if row.alternatives else found[:2]


def test_answers_are_those_of_rows_alone_while_others_come_and_go(
  policy, decoder
):
  rows = [make_row(policy, i) for i in range(9)]
  traced = decoder.trace_count
  expected = [alone(decoder, row) for row in rows]
  batch = decoder.begin(rows[:2])
  running, waiting = {0: 0, 1: 1}, list(range(2, len(rows)))
  used = {0, 1}
  lengths = set()
  while running:
    sampled = batch.advance(batch.steps + 5)
    for slot in [s for s in running if sampled.ended[s]]:
      i = running.pop(slot)
      found = answer(sampled, slot)
      assert found[: len(expected[i])] == expected[i], i
      lengths.add(len(found[0]))
    free = [s for s in (0, 1, 3, 7) if s not in running]
    joining = dict(zip(free, waiting, strict=False))
    waiting = waiting[len(joining) :]
    batch.admit({slot: rows[i] for slot, i in joining.items()})
    running |= joining
    used |= joining.keys()
  assert (
    not waiting and used == {0, 1, 3, 7} and len(lengths) > 3 and 12 in lengths
  )
  assert decoder.trace_count == traced


def test_what_a_row_leaves_in_its_slot_reaches_nobody(policy, decoder):
  row, other = make_row(policy, 5), make_row(policy, 6)
  broken = row._replace(
    coefficients=np.full_like(row.coefficients, np.nan), max_tokens=12
  )
  batch = decoder.begin([broken, other])
  assert not np.isfinite(batch.advance(12).logp[0]).all()
  batch.admit({0: row, 1: other})
  sampled = batch.advance(24)
  for slot, own in enumerate((row, other)):
    expected = alone(decoder, own)
    assert answer(sampled, slot)[: len(expected)] == expected


class Script:
  """A decoder of two slots, whose rows have as many tokens as they may.

  Attributes:
    joined: (step, slot, max_tokens) of each row.
  """

  rows, max_tokens, eos_ids = 2, 64, (1,)

  def __init__(self, before_step=lambda step: None):
    self._before_step = before_step
    self.joined = []
    self._step, self._slots = 0, {}

  def begin(self, rows):
    self._step, self._slots = 0, {}
    self.admit(dict(enumerate(rows)))
    return self

  def admit(self, rows):
    for slot, row in rows.items():
      self.joined.append((self._step, slot, row.max_tokens))
      self._slots[slot] = (self._step, row.max_tokens)

  def stop(self, slot):
    del self._slots[slot]

  def advance(self, until):
    self._before_step(self._step)
    self._step = until
    lengths, ended = np.zeros(2, int), np.ones(2, bool)
    for slot, (start, length) in self._slots.items():
      lengths[slot] = min(length, until - start)
      ended[slot] = lengths[slot] == length
    number = np.full([2, 64], 5)
    return Sampled(number, -1.0 * number, lengths, ended, None, None)


NOBODY = Row(np.ones(3), np.ones(2), 0, 0, 1.0, 1.0, 1, False)


def serve(script, work):
  """Runs `work(submit)` beside a batcher; submit(tokens, ...) is a ticket."""
  spells = []

  async def run():
    batcher = Batcher(script, 100, lambda *spell: spells.append(spell[0]))

    def submit(*max_tokens, streamed=False):
      rows = [NOBODY._replace(max_tokens=n) for n in max_tokens]
      return batcher.submit(rows, streamed)

    try:
      return await work(batcher, submit)
    finally:
      await asyncio.to_thread(batcher.close)

  return asyncio.run(asyncio.wait_for(run(), 20)), spells


async def lengths_of(ticket):
  found = [0] * len(ticket.rows)
  async for piece in ticket:
    found[piece.row] += len(piece.tokens)
  return found


class TestSlots:
  def test_a_long_answer_keeps_no_short_one_waiting(self):
    script = Script()

    async def work(batcher, submit):
      return await lengths_of(submit(64, *[TOGETHER] * 6))

    found, spells = serve(script, work)
    assert found == [64] + [TOGETHER] * 6
    # Each short one joins where the one before it has ended.
    turns = [(TOGETHER * i, 1, TOGETHER) for i in range(6)]
    assert script.joined == [(0, 0, 64), *turns]
    assert spells == [2] * 6

  def test_rows_take_slots_in_the_order_in_which_they_came(self):
    script = Script()

    async def work(batcher, submit):
      return await lengths_of(submit(9, 20, 1, 30, 2))

    found, _ = serve(script, work)
    assert found == [9, 20, 1, 30, 2]
    at = [(step // TOGETHER, slot) for step, slot, _ in script.joined]
    assert at == [(0, 0), (0, 1), (2, 0), (3, 0), (3, 1)]

  @pytest.mark.parametrize("how", ["cancelled", "stopped"])
  def test_who_leaves_frees_a_slot_at_the_next_boundary(self, how):
    tickets = []

    def leave(step):
      if step == 2 * TOGETHER:
        if how == "cancelled":
          tickets[0].cancelled = True
        else:
          tickets[0].stop(0)

    script = Script(leave)

    async def work(batcher, submit):
      tickets.extend([submit(64), submit(64), submit(5)])
      return await lengths_of(tickets[2])

    found, _ = serve(script, work)
    assert found == [5]
    assert script.joined[-1] == (3 * TOGETHER, 0, 5)

  def test_a_failure_is_that_of_those_in_slots_alone(self):
    def fail(step):
      if step == TOGETHER and len(script.joined) == 2:
        raise RuntimeError("of the device")

    script = Script(fail)

    async def work(batcher, submit):
      tickets = [submit(64), submit(64), submit(5)]
      for ticket in tickets[:2]:
        with pytest.raises(Unavailable):
          await lengths_of(ticket)
      return await lengths_of(tickets[2])

    found, _ = serve(script, work)
    assert found == [5]
    assert script.joined[-1] == (0, 0, 5)

  def test_a_stream_hears_of_every_piece(self):
    async def work(batcher, submit):
      ticket = submit(18, streamed=True)
      other = asyncio.create_task(lengths_of(submit(30)))
      pieces = [len(piece.tokens) async for piece in ticket]
      return pieces, await other

    (pieces, other), _ = serve(Script(), work)
    assert sum(pieces) == 18 and max(pieces) < TOGETHER and other == [30]

  def test_closing_lets_those_in_slots_end_and_no_others(self):
    go = threading.Event()

    async def work(batcher, submit):
      tickets = [submit(64), submit(64), submit(5)]
      while batcher.running < 2:
        await asyncio.sleep(0)
      closing = asyncio.create_task(asyncio.to_thread(batcher.close))
      while batcher.alive:
        await asyncio.sleep(0)
      go.set()
      await closing
      assert [await lengths_of(t) for t in tickets[:2]] == [[64], [64]]
      with pytest.raises(Unavailable):
        await lengths_of(tickets[2])

    script = Script(lambda step: go.wait(20))
    serve(script, work)
    assert len(script.joined) == 2
