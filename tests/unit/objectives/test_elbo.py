"""dalorra_core.objectives.elbo: likelihood over the label subset, and the bound."""

import math

import pytest
import torch

from dalorra_core.objectives.elbo import KlTerm, label_log_probs, mean_nll, neg_elbo


def logits_of(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_probabilities_are_normalised_over_the_labels_of_each_row() -> None:
    logits = logits_of(2, 2, 3)
    allowed = torch.tensor([[True, False, True], [True, True, True]])
    probs = label_log_probs(logits, allowed).exp()
    for s in range(2):
        for b in range(2):
            weights = [math.exp(logits[s, b, c]) if allowed[b, c] else 0.0 for c in range(3)]
            expected = [w / sum(weights) for w in weights]
            assert probs[s, b].tolist() == pytest.approx(expected, rel=1e-12)
    assert label_log_probs(logits, allowed)[0, 0, 1].item() == -math.inf


def test_a_label_that_is_not_allowed_gets_no_gradient() -> None:
    logits = logits_of(1, 1, 3).requires_grad_()
    mean_nll(logits, torch.tensor([0]), torch.tensor([[True, False, True]])).backward()
    assert logits.grad is not None
    p = torch.softmax(logits.detach()[0, 0, [0, 2]], -1)
    assert logits.grad[0, 0].tolist() == pytest.approx([float(p[0]) - 1, 0.0, float(p[1])])


def test_log_likelihoods_are_averaged_over_samples_not_logits_or_probabilities() -> None:
    logits, labels = 3 * logits_of(4, 5, 3), torch.tensor([0, 2, 1, 1, 0])
    rows = range(5)
    expected = -sum(
        math.log(math.exp(logits[s, b, labels[b]]) / sum(math.exp(v) for v in logits[s, b]))
        for s in range(4)
        for b in rows
    ) / (4 * 5)
    found = mean_nll(logits, labels).item()
    assert found == pytest.approx(expected, rel=1e-12)
    of_mean_logits = -logits.mean(0).log_softmax(-1)[rows, labels].mean().item()
    of_mixture = -logits.softmax(-1).mean(0)[rows, labels].log().mean().item()
    assert abs(of_mean_logits - expected) > 0.1
    assert of_mixture < expected - 0.1  # Jensen: the mixture is always at least as likely


def test_the_loss_adds_each_divergence_with_its_own_factor() -> None:
    nll = torch.tensor(2.0, requires_grad=True)
    first = torch.tensor(3.0, requires_grad=True)
    second = torch.tensor(5.0, requires_grad=True)
    loss = neg_elbo(nll, {"a": KlTerm(first, 0.1), "b": KlTerm(second, 0.01)})
    loss.backward()
    assert loss.item() == pytest.approx(2.35)
    assert [nll.grad, first.grad, second.grad] == [pytest.approx(v) for v in (1.0, 0.1, 0.01)]


def test_without_divergences_the_loss_is_the_likelihood() -> None:
    assert neg_elbo(torch.tensor(2.0), {}).item() == 2.0
