"""A scheduler on a bench: with a fake device and a clock, its books checked at every commit."""

from engineroom.engine.core.request import Request
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.scheduler import Scheduler, SchedulerConfig
from tests.core.fakes import EOS, FakeDevice

BANNED = -1


class Bench:
    """A scheduler with a fake device; every commit checks the books."""

    def __init__(self, fault=None, **limits):
        defaults = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 64,
            "num_blocks": 32,
            "block_size": 2,
        }
        self.config = SchedulerConfig(**{**defaults, **limits})
        self.now = 0.0
        self.scheduler = Scheduler(self.config, clock=self.clock, fault=fault)
        self.device = FakeDevice(self.config.num_blocks, self.config.block_size)
        self.updates = []

    def clock(self):
        self.now += 1.0
        return self.now

    def request(self, name="r", prompt=4, *, max_tokens=4, tokens=None, **options):
        """`prompt`: token ids, or how many; `tokens`: what the model will say, else never EOS."""
        ids = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
        params = options.pop("params", None) or SamplingParams(max_tokens=max_tokens)
        request = Request(
            request_id=name,
            prompt_token_ids=ids,
            params=params,
            max_tokens=max_tokens,
            seed=0,
            eos_token_ids=frozenset({EOS}),
            **options,
        )
        said = tokens if tokens is not None else [1 + i % 5 for i in range(max_tokens + 2)]
        self.device.scripts[request] = Said(said)
        return request

    def add(self, *args, **options):
        request = self.request(*args, **options)
        self.scheduler.add(request)
        return request

    def step(self):
        """Plan and commit one step; returns the plan."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.commit(plan)
        return plan

    def commit(self, plan):
        self.updates += self.scheduler.commit(plan, self.device.execute(plan))
        self.scheduler.check_integrity()

    def run(self, limit=500):
        while self.scheduler.has_work:
            limit -= 1
            assert limit, "never ends"
            self.step()
            self.updates += self.scheduler.drain_finished()
        return self

    def of(self, request):
        return [u for u in self.updates if u.request is request]


class Said:
    def __init__(self, tokens):
        self.tokens = tokens

    def token(self, index):
        return self.tokens[index]


def shares(plan):
    """[(request id, start, number of tokens)] of a plan."""
    return [(s.request.request_id, s.start, s.num_tokens) for s in plan.requests]
