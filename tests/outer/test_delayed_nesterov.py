"""DelayedNesterov is Algorithm 3, and Nesterov SGD on the mean where the paper says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_async_localsgd.outer import DelayedNesterov

SHAPES = [(3, 4), (7,), (70_000,)]  # the last is longer than one block


def algorithm_3(
    theta: Tensor, pseudo_gradients: list[Tensor], lr: float, beta: float, n: int, c: float
) -> list[Tensor]:
    """Algorithm 3 of Liu et al. 2024, line by line; returns theta after each pseudo-gradient."""
    m, delta, trace = torch.zeros_like(theta), torch.zeros_like(theta), []
    for t, g in enumerate(pseudo_gradients):
        delta = delta + g
        if (t + 1) % n == 0:
            m = beta * m + delta / n
            theta = theta - lr * ((1 - c * n + c) * beta * m + g / n)
            delta = torch.zeros_like(theta)
        else:
            theta = theta - lr * (c * beta * m + g / n)
        trace.append(theta)
    return trace


def random_sequence(shape: tuple[int, ...], length: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(length)
    theta, *gradients = torch.randn(length + 1, *shape, generator=generator, dtype=torch.float64)
    return theta, gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("c_times_n", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("saved_after", [None, 1, 5])  # in the middle of a buffer for n = 3 and 4
def test_equals_algorithm_3(shape: tuple[int, ...], n: int, c_times_n: float, saved_after: int | None) -> None:
    theta, gradients = random_sequence(shape, 11)
    c = c_times_n / n
    expected = algorithm_3(theta, gradients, 0.7, 0.9, n, c)
    parameter = Parameter(theta.clone())
    optimizer = DelayedNesterov([parameter], lr=0.7, momentum=0.9, buffer_size=n, momentum_activation=c)
    for t, g in enumerate(gradients):
        if t == saved_after:
            state, values = optimizer.state_dict(), parameter.detach().clone()
            parameter = Parameter(values)
            optimizer = DelayedNesterov([parameter], lr=0.1, momentum=0.0)  # everything comes from the state
            optimizer.load_state_dict(state)
        parameter.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), expected[t], rtol=0, atol=1e-12)
        torch.testing.assert_close(parameter.grad, g, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_deltas_from_one_point_equal_one_nesterov_step_on_their_mean(n: int) -> None:
    theta, gradients = random_sequence((5, 6), 4 * n)
    ours, sgd = Parameter(theta.clone()), Parameter(theta.clone())
    delayed = DelayedNesterov([ours], lr=0.7, momentum=0.9, buffer_size=n)
    nesterov = torch.optim.SGD([sgd], lr=0.7, momentum=0.9, nesterov=True)
    for start in range(0, 4 * n, n):
        batch = gradients[start : start + n]
        for g in batch:
            ours.grad = g
            delayed.step()
        sgd.grad = torch.stack(batch).mean(0)
        nesterov.step()
        torch.testing.assert_close(ours.detach(), sgd.detach(), rtol=0, atol=1e-12)


def test_parameters_without_a_gradient_stay() -> None:
    parameter = Parameter(torch.ones(3))
    DelayedNesterov([parameter], buffer_size=2).step()
    assert torch.equal(parameter, torch.ones(3))


def test_open_buffer_size_is_refused_at_the_step_and_filled_in_once() -> None:
    parameter = Parameter(torch.zeros(2))
    optimizer = DelayedNesterov([parameter])
    with pytest.raises(RuntimeError, match="pass the number of workers"):
        optimizer.step()
    optimizer.set_default_buffer_size(3)
    optimizer.set_default_buffer_size(5)
    assert optimizer.param_groups[0]["buffer_size"] == 3


def test_a_buffer_that_was_left_open_follows_the_workers_and_a_given_one_does_not() -> None:
    parameters = [Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = DelayedNesterov([{"params": parameters[:1]}, {"params": parameters[1:], "buffer_size": 4}])
    optimizer.set_default_buffer_size(3)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    optimizer.follow_workers(2)
    assert [group["buffer_size"] for group in optimizer.param_groups] == [2, 4]
    assert [group["received"] for group in optimizer.param_groups] == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"buffer_size": 0}, "buffer_size"),
        ({"buffer_size": 4, "momentum_activation": 0.26}, "momentum_activation"),
        ({"momentum_activation": -0.1}, "momentum_activation"),
        ({"momentum_activation": 1.1}, "momentum_activation"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DelayedNesterov([Parameter(torch.zeros(1))], **arguments)


def test_activation_is_checked_again_when_the_number_of_workers_is_known() -> None:
    optimizer = DelayedNesterov([Parameter(torch.zeros(1))], momentum_activation=0.5)
    with pytest.raises(ValueError, match=r"between 0 and 1/buffer_size = 0\.25"):
        optimizer.set_default_buffer_size(4)


@pytest.mark.parametrize("round_length", [None, 1, 2, 10, 50, 200])
def test_momentum_grows_with_the_steps_of_the_buffers_filled_as_far_as_rounds_reach(round_length: int | None) -> None:
    n, growth, reach = 3, 0.5, 0.1
    theta, gradients = random_sequence((4, 5), 30 * n)
    growing = Parameter(theta.clone())
    optimizer = DelayedNesterov([growing], lr=0.7, momentum=0.8, buffer_size=n, growth=growth, reach=reach)
    if round_length is not None:
        optimizer.set_round_length(round_length)
    expected, momentum, betas = theta.clone(), torch.zeros_like(theta), []
    for filled in range(30):
        steps = 1e9 if round_length is None else round_length
        horizon = 1 + min(growth * filled * min(1.0, max(4, steps) / 50), reach * max(2, steps))
        betas.append(min(0.8, 1 - 1 / horizon))
        mean = torch.stack(gradients[n * filled : n * (filled + 1)]).mean(0)
        momentum = betas[-1] * momentum + mean
        expected = expected - 0.7 * (mean + betas[-1] * momentum)
        for g in gradients[n * filled : n * (filled + 1)]:
            growing.grad = g
            optimizer.step()
        torch.testing.assert_close(growing.detach(), expected, rtol=0, atol=1e-12)
    assert betas[0] == 0
    beyond = {1: 0.2, 2: 0.2, 10: 1.0}  # of longer rounds, the momentum of 0.8 is the limit
    assert betas[-1] == pytest.approx(1 - 1 / (1 + beyond.get(round_length or 50, 4.0)))


def test_rounds_that_change_their_length_keep_the_growth_made() -> None:
    parameter = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DelayedNesterov([parameter], buffer_size=1, growth=0.5, reach=1.0)
    for round_length, buffers in ((5, 10), (50, 2), (100, 1)):
        optimizer.set_round_length(round_length)
        for _ in range(buffers):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    optimizer.set_round_length(5)
    before = parameter.item()
    momentum = optimizer.state[parameter]["momentum"].item()
    optimizer.step()
    beta = 1 - 1 / (1 + 0.5 * (10 * 5 / 50 + 2 + 1))
    assert before - parameter.item() == pytest.approx(0.7 * (1 + beta * (beta * momentum + 1)))


def test_growth_goes_on_where_it_was_saved() -> None:
    theta, gradients = random_sequence((6,), 20)
    parameter, whole = Parameter(theta.clone()), Parameter(theta.clone())
    optimizer = DelayedNesterov([parameter], buffer_size=2, growth=0.3)
    reference = DelayedNesterov([whole], buffer_size=2, growth=0.3)
    for t, g in enumerate(gradients):
        if t == 7:
            state = optimizer.state_dict()
            optimizer = DelayedNesterov([parameter], buffer_size=2, growth=0.3)
            optimizer.load_state_dict(state)
        parameter.grad = whole.grad = g
        optimizer.step()
        reference.step()
    assert torch.equal(parameter, whole)


@pytest.mark.parametrize("name", ["growth", "reach"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_growth_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a number above 0"):
        DelayedNesterov([Parameter(torch.zeros(1))], **{name: value})
