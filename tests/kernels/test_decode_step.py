"""What a decode step has between its products, against the formulas in float64 and plain torch's rounding."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import TRITON_DTYPES, assert_as_accurate
from clp_kernels import batch_invariant
from later import later

pytest.importorskip("triton")

from clp_kernels.reference import decode_step as reference  # noqa: E402
from clp_kernels.triton_kernels import decode_step, launch  # noqa: E402

pytestmark = [
    pytest.mark.parametrize("backend", ["triton"], indirect=True),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
]
DTYPE = pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
EPS = 1e-6


def normed(x, gain):
    return x if gain is None else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * gain


def both(function, *tensors):
    """The formula in float64, and in the tensors' own dtype with norms and softmax in float32 as transformers has them."""
    wide, own = (
        [None if t is None else t.to(kind) for t in tensors] for kind in (torch.float64, torch.float32)
    )
    return function(*wide), function(*own)


@DTYPE
@pytest.mark.parametrize("width", [32, 45, 1100])
@pytest.mark.parametrize("with_gains", ["neither", "in front", "behind too"])
def test_add_norm(backend, dtype, width, with_gains):
    x, y = (torch.randn(5, width).to(dtype) for _ in range(2))
    gain_y = torch.rand(width) + 0.5 if with_gains == "behind too" else None
    gain_n = None if with_gains == "neither" else torch.rand(width) + 0.5
    (exact, exact_n), (plain, plain_n) = both(
        lambda x, y, a, b: (x + 0.7 * normed(y, a), normed(x + 0.7 * normed(y, a), b)), x, y, gain_y, gain_n
    )
    n = decode_step.add_norm(x, y, gain_y, gain_n, 0.7, EPS)
    assert_as_accurate(x, plain.to(dtype), exact, "x")
    # n is of the x that was rounded.
    assert_as_accurate(n, plain_n.to(dtype), exact_n, "n", factor=3)
    assert (n is x) == (with_gains == "neither")


@DTYPE
def test_embed(backend, dtype):
    embedding, gain = torch.randn(50, 40).to(dtype), torch.rand(40)
    tokens = torch.tensor([3, 49, 0, 3])
    x, n = decode_step.embed(tokens, embedding, 2.5, gain, EPS)
    exact = embedding[tokens].double() * 2.5
    assert_as_accurate(x, exact.to(dtype), exact)
    assert_as_accurate(n, normed(exact, gain).to(dtype), normed(exact, gain.double()), factor=3)


@DTYPE
@pytest.mark.parametrize("size, rotary", [(16, 16), (24, 24), (32, 8)])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_and_store(backend, dtype, size, rotary, with_norms):
    rows, heads, kv_heads, group, room = 6, 4, 2, 3, 7
    q, k, v = (torch.randn(rows, n, size).to(dtype) for n in (heads, kv_heads, kv_heads))
    keys, values = (torch.full((rows, kv_heads, room, size), 7.0).to(dtype) for _ in range(2))
    lengths, before = torch.tensor([0, 6, 2, 3, 1, 5]), torch.tensor([4, 9])
    cos, sin = (torch.randn(20, rotary).to(dtype) for _ in range(2))
    gains = (torch.rand(size) + 0.5, torch.rand(size) + 0.5) if with_norms else None

    def turned(x, gain, cos, sin):
        x = normed(x, gain)
        position = before.repeat_interleave(group) + lengths
        c, s = (table[position].unsqueeze(1) for table in (cos, sin))
        part = x[..., :rotary]
        other = torch.cat([-part[..., rotary // 2 :], part[..., : rotary // 2]], -1)
        return torch.cat([part * c + other * s, x[..., rotary:]], -1)

    exact_q, plain_q = both(turned, q, gains and gains[0], cos, sin)
    exact_k, plain_k = both(turned, k, gains and gains[1], cos, sin)
    decode_step.rope_and_store(q, k, v, keys, values, lengths, before, cos, sin, gains, group, EPS)
    everyone = torch.arange(rows)
    assert_as_accurate(q, plain_q.to(dtype), exact_q, "q")
    assert_as_accurate(keys[everyone, :, lengths], plain_k.to(dtype), exact_k, "k")
    assert torch.equal(values[everyone, :, lengths], v)
    for buffer in (keys, values):  # nothing else was touched
        buffer[everyone, :, lengths] = 7.0
        assert (buffer == 7.0).all()


def attention(q, prompt_keys, prompt_values, keys, values, lengths, before, group, scale, softcap, window):
    """Row after row, over the keys that there are."""
    out = torch.empty_like(q)
    shared = q.shape[1] // keys.shape[1]
    for row in range(q.shape[0]):
        p, n, m = row // group, int(before[row // group]), int(lengths[row]) + 1
        k = torch.cat([prompt_keys[p, :, :n], keys[row, :, :m]], 1).repeat_interleave(shared, 0)
        v = torch.cat([prompt_values[p, :, :n], values[row, :, :m]], 1).repeat_interleave(shared, 0)
        z = scale * (q[row].unsqueeze(1) @ k.mT)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        if window is not None:
            z[..., : max(n + m - window, 0)] = -torch.inf
        out[row] = (z.softmax(-1) @ v).squeeze(1)
    return out


@DTYPE
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("heads, kv_heads, size", [(7, 1, 24), *later((4, 2, 16), (3, 3, 64))])
@pytest.mark.parametrize("options", [(None, None), (3.0, None), (None, 5), (2.0, 90)], ids=str)
def test_attend(backend, dtype, pieces, heads, kv_heads, size, options, monkeypatch):
    # Prompts of no, of one and of several blocks of keys, a row that has only its own first key, one whose pieces are empty.
    group, width, room = 2, 150, 80
    monkeypatch.setattr(decode_step, "pieces_of", lambda *_: pieces)
    lengths, before = torch.tensor([0, 79, 64, 3, 63, 0]), torch.tensor([150, 1, 0])
    q = torch.randn(6, heads, size).to(dtype)
    prompts = [torch.randn(3, kv_heads, width, size).to(dtype) for _ in range(2)]
    own = [torch.randn(6, kv_heads, room, size).to(dtype) for _ in range(2)]
    for row in range(6):  # what lies behind is not read
        for buffer in own:
            buffer[row, :, int(lengths[row]) + 1 :] = torch.nan
    for p in range(3):
        for buffer in prompts:
            buffer[p, :, int(before[p]) :] = torch.nan
    found = decode_step.attend(q, prompts, own, lengths, before, group, 0.3, *options)
    exact, plain = both(
        lambda *tensors: attention(*tensors, lengths, before, group, 0.3, *options), q, *prompts, *own
    )
    # Shares are rounded to the values' dtype before they are multiplied, as torch's are.
    assert_as_accurate(found, plain.to(dtype), exact, factor=4)


def test_keys_are_cut_where_rows_are_few_and_never_in_batch_invariant_mode(backend, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    assert [decode_step.pieces_of(rows, 4, device) for rows in (1, 16, 64, 512)] == [8, 4, 1, 1]
    with batch_invariant():
        assert decode_step.pieces_of(1, 4, device) == 1


@DTYPE
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(backend, dtype, activation):
    gate, up = (torch.randn(3, 700).to(dtype) * 3 for _ in range(2))
    function = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    exact, plain = both(lambda g, u: function(g) * u, gate, up)
    assert_as_accurate(decode_step.gated(gate, up, activation), plain.to(dtype), exact)


@pytest.mark.parametrize("some", [False, True], ids=["the first rows", "some rows"])
def test_record(backend, some):
    """Rows that run, that end by a stop token, by their limit, by no token at all, and that have ended before."""
    rows, room = 9, 5

    def fresh():
        count = torch.tensor([0, 1, 4, 2, 3, 2, 5, 0, 1])
        limit = torch.tensor([5, 2, 5, 2, 5, 5, 5, 0, 4])
        tokens = torch.arange(rows * room).view(rows, room)
        made = [tokens.clone(), tokens / 7, tokens * 11, count, limit]
        return decode_step.Completions(*made, *(torch.arange(rows) + 100 * i for i in range(3)))

    drawn, logprob = torch.tensor([40, 41, 42, 43, 7, -1, 44, 45, 46]), torch.linspace(-3, -1, rows)
    chosen = torch.tensor([8, 0, 4, 3]) if some else None
    n = 4 if some else rows
    given = drawn[:n], logprob[:n], torch.tensor([3, 7, 42])
    found, expected = fresh(), fresh()
    decode_step.record(*given, found, chosen)
    reference.record(*given, expected, chosen)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name
    if not some:
        assert expected.count.tolist() == [1, 2, 5, 2, 4, 3, 5, 0, 2]
        assert expected.limit.tolist() == [5, 2, 5, 2, 4, 3, 5, 0, 4]
        assert expected.last.tolist() == [40, 41, 42, 3, 7, 0, 6, 7, 46]
        assert expected.lengths.tolist() == [0, 1, 4, 203, 3, 2, 206, 207, 1]
        assert expected.seed.tolist() == [11, 77, 102, 103, 264, 308, 106, 107, 462]
        assert expected.tokens[4].tolist() == [20, 21, 22, 7, 24]
