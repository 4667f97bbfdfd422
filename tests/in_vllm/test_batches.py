"""One vLLM engine, requests of many weightings: token for token what this engine completes by itself."""

import gc

import pytest
import torch
from served import DEFAULT, NEW_TOKENS, PLAIN, POLICIES, Served, prepare, prompt
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

BLOCK = 32
STEP_TOKENS = 16  # a prompt of 90 tokens is read in six steps or more, beside rows that decode
WEIGHTINGS = [{"a": 1.0}, {"b": 1.0}, {"a": 0.3, "b": 0.7}, [0.5, 0.5], {"a": 0.8, "b": 0.2}]


class Engine:
    """vLLM with a stack and a plain adapter, of a model, with few blocks and small steps."""

    def __init__(self, served: Served):
        self.served = served
        self.llm = LLM(
            str(served.base),
            dtype="float32",
            enforce_eager=True,
            enable_lora=True,
            max_loras=2,
            max_lora_rank=served.max_lora_rank,
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=STEP_TOKENS,
            block_size=BLOCK,
            num_gpu_blocks_override=8,
            gpu_memory_utilization=0.05,
            disable_log_stats=False,
        )
        self.adapters = {
            "stack": LoRARequest("stack", 1, str(served.stack)),
            "plain": LoRARequest("plain", 2, str(served.plain)),
            None: None,
        }

    def complete(self, requests, logprobs=None):
        """requests: (prompt, adapter, extra_args). Returns vLLM's completions."""
        prompts, adapters, extra = zip(*requests)
        params = [
            SamplingParams(max_tokens=NEW_TOKENS, temperature=0, extra_args=args, logprobs=logprobs)
            for args in extra
        ]
        done = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            params,
            lora_request=[self.adapters[name] for name in adapters],
            use_tqdm=False,
        )
        return [request.outputs[0] for request in done]

    def tokens(self, requests):
        return [list(output.token_ids) for output in self.complete(requests)]

    def count(self, metric):
        return sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{metric}")


@pytest.fixture(scope="module", params=sorted(POLICIES))
def engine(request, tmp_path_factory):
    served = prepare(tmp_path_factory.mktemp(request.param), request.param)
    made = Engine(served)
    yield made
    del made.llm
    gc.collect()
    cleanup_dist_env_and_memory()


def clp(weights, kl=0.1):
    return {"clp": {"weights": weights, "kl": kl}}


def mixed(lengths, kl=0.2):
    """Requests of all weightings, a plain adapter, the base model and the stack's default, and a function of the engine
    that gives their completions."""
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    rows = [("stack", clp(w, kl)) for w in WEIGHTINGS] + [("plain", None), (None, None), ("stack", None)]
    requests = [(ids, *rows[i % len(rows)]) for i, ids in enumerate(prompts)]

    def expected(served):
        answers = []
        for ids, adapter, extra in requests:
            if adapter is None:
                answers += served.base_tokens([ids])
            elif adapter == "plain":
                answers += served.tokens([ids], PLAIN, 0.1)
            elif extra is None:
                answers += served.tokens([ids], DEFAULT, 0.1)
            else:
                answers += served.tokens([ids], extra["clp"]["weights"], extra["clp"]["kl"])
        return answers

    return requests, expected


def test_a_batch_of_all_weightings_a_plain_adapter_and_the_base_model(engine):
    requests, expected = mixed([5, 6, 7, 8, 9, 10, 11, 12])
    own = expected(engine.served)
    assert engine.tokens(requests) == own
    # One prompt has eight different completions, so that a gate of another row would show.
    same = [(requests[0][0], *request[1:]) for request in requests]
    found = engine.tokens(same)
    assert len(set(map(tuple, found))) >= 6
    assert found[:5] == engine.served.tokens([same[0][0]] * 5, WEIGHTINGS, 0.2)


def test_the_strength_of_a_blend_follows_the_kl_coefficient(engine):
    ids, kls = prompt(8, 20), [0.06, 0.3, 0.9]
    found = engine.tokens([(ids, "stack", clp([0.5, 0.5], kl)) for kl in kls])
    assert found == engine.served.tokens([ids] * 3, [[0.5, 0.5]] * 3, kls)
    assert len(set(map(tuple, found))) > 1


def test_prompts_in_chunks_beside_rows_that_decode(engine):
    requests, expected = mixed([90, 4, 61, 5, 77, 33, 48, 90, 3, 70, 17])
    assert engine.tokens(requests) == expected(engine.served)


def test_preempted_requests_keep_their_weighting(engine):
    """A prompt of 95 tokens needs three of the seven blocks, and a fourth when it decodes: some are drawn again."""
    before = engine.count("num_preemptions")
    requests, expected = mixed([95] * 8)
    assert engine.tokens(requests) == expected(engine.served)
    assert engine.count("num_preemptions") > before


def test_a_prefix_cache_is_used_by_the_same_weighting_and_by_no_other(engine):
    ids = prompt(3 * BLOCK + 5, 30)
    rows = [("stack", clp(w)) for w in WEIGHTINGS] + [("plain", None), (None, None)]
    own = engine.served.tokens([ids] * 5, WEIGHTINGS, 0.1)
    own += engine.served.tokens([ids], PLAIN, 0.1) + engine.served.base_tokens([ids])
    for row, expected in zip(rows, own):
        for hits in (0, 3 * BLOCK):
            before = engine.count("prefix_cache_hits")
            assert engine.tokens([(ids, *row)]) == [expected]
            assert engine.count("prefix_cache_hits") - before == hits, row


def test_log_probs_are_the_policys_own(engine):
    """To 1e-4 in float32: vLLM and this engine sum in different orders."""
    ids = prompt(9, 40)
    done = engine.complete([(ids, "stack", clp(w, 0.2)) for w in WEIGHTINGS], logprobs=0)
    for output, weights in zip(done, WEIGHTINGS):
        tokens = list(output.token_ids)
        found = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, tokens)])
        own = engine.served.logprobs(ids, tokens, weights, 0.2)
        torch.testing.assert_close(found, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "extra", "message"),
    [
        ("stack", clp({"a": 0.5, "c": 0.5}), "unknown objective 'c'; this policy has a, b"),
        ("stack", clp({"a": 1.5, "b": -0.5}), "weights must not be negative; got a=1.5, b=-0.5"),
        ("stack", clp({"a": 0.5, "b": 0.6}), "weights must sum to 1; got a=0.5, b=0.6, which sums to 1.1"),
        ("stack", clp({"a": 1.0}, kl=-1), "kl=-1.0: expected alpha between 0 and 1"),
        ("stack", {"clp": {"weight": {}}}, "unknown field 'weight'; expected weights, kl"),
        ("plain", clp({"a": 1.0}), "has no objectives; name a stack as its model"),
        (None, clp({"a": 1.0}), "has no objectives; name a stack as its model"),
    ],
)
def test_a_wrong_request_fails_alone(engine, adapter, extra, message):
    ids = prompt(6, 50)
    with pytest.raises(VLLMValidationError) as error:
        engine.complete([(ids, "stack", clp([1.0, 0.0])), (ids, adapter, extra)])
    assert message in str(error.value)
    assert engine.tokens([(ids, "stack", clp([1.0, 0.0]))]) == engine.served.tokens([ids], [1.0, 0.0], 0.1)


def test_one_object_of_parameters_serves_many_requests(engine):
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, extra_args=clp({"a": 1.0}))
    ids = [prompt(6, 60), prompt(7, 61)]
    for _ in range(2):
        done = engine.llm.generate(
            [{"prompt_token_ids": p} for p in ids],
            params,
            lora_request=engine.adapters["stack"],
            use_tqdm=False,
        )
        assert [list(d.outputs[0].token_ids) for d in done] == engine.served.tokens(ids, {"a": 1.0}, 0.1)
    assert params.extra_args == clp({"a": 1.0})


def test_several_samples_of_one_request_have_its_weighting(engine):
    ids, lora = prompt(6, 70), engine.adapters["stack"]
    params = SamplingParams(n=3, max_tokens=4, logprobs=0, extra_args=clp({"b": 1.0}, 0.2))
    (done,) = engine.llm.generate({"prompt_token_ids": ids}, params, lora_request=lora, use_tqdm=False)
    assert len({tuple(output.token_ids) for output in done.outputs}) > 1
    for output in done.outputs:
        tokens = list(output.token_ids)
        found = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, tokens)])
        own = engine.served.logprobs(ids, tokens, {"b": 1.0}, 0.2)
        torch.testing.assert_close(found, own, rtol=0, atol=1e-4)


def test_a_new_version_under_the_same_name_has_its_own_weights_and_its_own_cache(engine, tmp_path):
    ids, policy = prompt(2 * BLOCK + 5, 80), engine.served.policy
    first, parameters = engine.served.tokens([ids], {"a": 1.0}, 0.1), policy.adapter_parameters()
    assert engine.tokens([(ids, "stack", clp({"a": 1.0}))]) == first
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(-1.2)
        policy.export_stack(tmp_path)
        engine.adapters["new"] = LoRARequest("stack-2", 3, str(tmp_path))
        second = engine.served.tokens([ids], {"a": 1.0}, 0.1)
        found = engine.tokens([(ids, "new", clp({"a": 1.0})), (ids, "stack", clp({"a": 1.0}))])
        assert found == [*second, *first] and first != second
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
