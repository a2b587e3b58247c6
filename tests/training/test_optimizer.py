"""The optimizer: clipping by the global norm, against numbers worked by hand."""

import pytest
import torch

from pyro_vae.training.optimizer import Optimizer


def stepped(clip_norm, *gradients, norm=None):
    """The step of SGD at learning rate 1, and the optimizer."""
    values = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in gradients]
    named = {str(i): value for i, value in enumerate(values)}
    optimizer = Optimizer(torch.optim.SGD, named, 1.0, clip_norm=clip_norm)
    for value, gradient in zip(values, gradients, strict=True):
        value.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer(values, norm=norm)
    return [(-value).tolist() for value in values], optimizer


@pytest.mark.parametrize("clip_norm", [None, 5.1, 20.0, 1e6])
def test_a_gradient_within_the_norm_is_left_as_it_is(clip_norm):
    (first, second), optimizer = stepped(clip_norm, [3.0, 0.0], [0.0, 4.0])
    assert first == [3.0, 0.0]
    assert second == [0.0, 4.0]
    assert optimizer.gradient_norm == pytest.approx(5.0)


@pytest.mark.parametrize("clip_norm", [4.9, 2.0, 0.5])
def test_a_longer_gradient_is_scaled_to_the_norm(clip_norm):
    (first, second), optimizer = stepped(clip_norm, [3.0, 0.0], [0.0, 4.0])
    assert first == pytest.approx([0.6 * clip_norm, 0.0], rel=1e-6)
    assert second == pytest.approx([0.0, 0.8 * clip_norm], rel=1e-6)
    assert optimizer.gradient_norm == pytest.approx(5.0)  # before clipping


def test_a_gradient_of_zero_stays_zero():
    (step,), optimizer = stepped(1.0, [0.0, 0.0])
    assert step == [0.0, 0.0]
    assert optimizer.gradient_norm == 0.0


def test_a_norm_that_is_known_is_not_computed_again():
    (step,), optimizer = stepped(1.0, [3.0, 4.0], norm=torch.tensor(10.0))
    assert step == pytest.approx([0.3, 0.4], rel=1e-6)
    assert optimizer.gradient_norm == 10.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    value = torch.nn.Parameter(torch.zeros(2))
    optimizer = Optimizer(torch.optim.Adam, {"a": value}, 0.1)
    for gradient in ([1.0, 1.0], [bad, 1.0]):
        value.grad = torch.tensor(gradient)
        before = value.detach().clone()
        if gradient[0] == 1.0:
            optimizer([value])
            assert not torch.equal(value, before)
        else:
            with pytest.raises(FloatingPointError):
                optimizer([value])
            assert torch.equal(value, before)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}])
def test_steps_are_those_of_torch_adam(options):
    """Also where the fused kernel is called without torch's own step, and after a change of lr."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5), torch.randn(6, 5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    stock = torch.optim.Adam([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-3, **options)

    def make(params, **more):
        return torch.optim.Adam(params, betas=(0.8, 0.95), eps=1e-3, **more, **options)

    def adam(params, lr, fused=None):
        return make(params, lr=lr, fused=fused)

    optimizer = Optimizer(adam, {"a": ours}, 0.1)
    for i, gradient in enumerate(gradients):
        if i == 4:
            optimizer.learning_rate = stock.param_groups[0]["lr"] = 0.03
            assert optimizer.learning_rate == 0.03
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer([ours])
        stock.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert optimizer._adam is not None  # the shortcut took part
    assert optimizer.get_state()["state"][0]["step"] == 6


def test_what_is_not_plain_adam_has_its_own_step():
    """Each of these options changes the step: so the shortcut must not be used."""
    gradients = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for option in ({"amsgrad": True}, {"decoupled_weight_decay": True, "weight_decay": 0.3}):
        ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        stock = torch.optim.Adam([theirs], lr=0.1, **option)

        def adam(params, lr, fused=None, option=option):
            return torch.optim.Adam(params, lr=lr, fused=fused, **option)

        optimizer = Optimizer(adam, {"a": ours}, 0.1)
        for gradient in gradients:
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            optimizer([ours])
            stock.step()
        torch.testing.assert_close(ours, theirs)


def test_a_parameter_without_a_gradient_is_left_alone():
    """As torch leaves it, before and after the shortcut is made, wherever it is in the list."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(3)) for _ in range(3)] for _ in range(2))
    stock = torch.optim.Adam(theirs, lr=0.1)
    optimizer = Optimizer(torch.optim.Adam, {str(i): p for i, p in enumerate(ours)}, 0.1)
    for present in ((0, 1, 2), (0, 1), (1, 2), (0,), (0, 1, 2)):
        for i, (mine, stocked) in enumerate(zip(ours, theirs, strict=True)):
            given = i in present
            mine.grad = torch.full((3,), i - 1.5) if given else None
            stocked.grad = mine.grad.clone() if given else None
        optimizer(ours)
        stock.step()
        for mine, stocked in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, stocked)


def test_without_any_gradient_nothing_happens():
    value = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer(torch.optim.Adam, {"a": value}, 0.1)
    optimizer([value])
    assert value.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_of_the_torch_optimizer_run_at_each_step(when):
    value, calls = torch.nn.Parameter(torch.ones(2)), []
    optimizer = Optimizer(torch.optim.Adam, {"a": value}, 0.1)
    register = getattr(optimizer.torch_optimizer, f"register_step_{when}_hook")
    register(lambda *_: calls.append(when))
    for _ in range(3):
        value.grad = torch.ones(2)
        optimizer([value])
    assert calls == [when] * 3


def test_an_optimizer_that_has_no_fused_kernel_is_taken_too():
    """RMSprop has no such argument."""
    ours, theirs = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    stock = torch.optim.RMSprop([theirs], lr=0.1)
    optimizer = Optimizer(torch.optim.RMSprop, {"a": ours}, 0.1)
    for _ in range(3):
        ours.grad, theirs.grad = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.0])
        optimizer([ours])
        stock.step()
    torch.testing.assert_close(ours, theirs)
