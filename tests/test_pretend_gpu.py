"""The pretended GPU goes wrong where a GPU would, and not elsewhere."""

import pytest
import torch
from devices import PRETENDED
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not PRETENDED, reason="CLP_PRETEND_GPU=1 pretends one"),
]


def test_devices_do_not_mix():
    gpu, host = torch.ones(3, device="cuda"), torch.ones(3)
    for mixed in (
        lambda: gpu + host,
        lambda: host @ gpu,
        lambda: torch.cat([gpu, host]),
        lambda: torch.where(gpu > 0, gpu, host),
        lambda: gpu.index_add_(0, torch.tensor([0]), host[:1]),
        lambda: host[torch.tensor([0, 1], device="cuda")],
    ):
        with pytest.raises(RuntimeError, match="same device, found cuda:0 and cpu"):
            mixed()
    assert torch.equal((gpu * torch.tensor(2.0) + 1).cpu(), host * 3)  # numbers of the host's are welcome
    assert gpu[torch.tensor([True, False, True])].shape == (2,) and gpu[torch.tensor([0])].is_cuda
    gpu.copy_(host * 5)
    assert gpu.tolist() == [5, 5, 5]


def test_memory_is_read_by_the_host_after_a_copy_alone():
    gpu = torch.arange(3, device="cuda")
    with pytest.raises(TypeError, match="use Tensor.cpu"):
        gpu.numpy()
    assert gpu.cpu().numpy().tolist() == [0, 1, 2] and gpu.to("cpu", torch.float32).dtype is torch.float32
    with pytest.raises(RuntimeError, match="cannot pin"):
        gpu.pin_memory()


def test_generators_are_of_the_device():
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    drawn = [torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_a_default_device_makes_tensors_there():
    with torch.device("cuda"):
        for made in (
            torch.zeros(2),
            torch.tensor([1]),
            torch.arange(3),
            torch.randn(2),
            nn.Linear(2, 2).weight,
        ):
            assert made.is_cuda and made.device.type == "cuda"
        assert not torch.zeros(2, device="cpu").is_cuda
    assert not torch.zeros(2).is_cuda


@pytest.mark.parametrize(
    "waits",
    [
        lambda gpu: gpu.sum().item(),
        lambda gpu: gpu.cpu(),
        lambda gpu: gpu.tolist(),
        lambda gpu: gpu[gpu > 0],
        lambda gpu: gpu.nonzero(),
        lambda gpu: torch.ones(3).to("cuda"),
        lambda gpu: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        lambda gpu: torch.tensor([1.0], device="cuda"),
        lambda gpu: torch.equal(gpu, gpu),
        lambda gpu: torch.cuda.synchronize(),
    ],
)
def test_what_waits_is_not_captured(waits):
    gpu = torch.ones(3, device="cuda")
    waits(gpu)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
        waits(gpu)


def test_a_graph_is_replayed_on_the_memory_it_saw():
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = x * 2
        zeros = torch.zeros(3, device="cuda")
        zeros += doubled  # anew at every replay
        total += zeros
        view = doubled[1:]
    assert total.tolist() == [0, 0, 0] and doubled.isnan().all()  # nothing was launched
    x.copy_(torch.full((3,), 5.0))
    for _ in range(2):
        graph.replay()
    assert doubled.tolist() == [10, 10, 10] and view.tolist() == [10, 10] and total.tolist() == [20, 20, 20]
    with pytest.raises(RuntimeError, match="holds nothing"):
        torch.cuda.CUDAGraph().replay()


def test_modules_move_and_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model.to("cuda")
    assert model[1].weight is model[0].weight and model[0].weight.is_cuda and model[2].running_mean.is_cuda
    model(torch.randn(5, 4, device="cuda")).square().sum().backward()
    assert model[0].weight.grad.is_cuda
    before = model[0].weight.detach().cpu()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    assert not torch.equal(model[0].weight.detach().cpu(), before)
    parameter = model[0].bias
    parameter.data = torch.full((4,), 3.0, device="cuda")
    assert parameter.tolist() == [3, 3, 3, 3]
