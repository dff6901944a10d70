"""Maps of attention against computations of their own: class activation maps, autograd and MONAI by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import IP, SEG, VR
from models.srresnet import SRResNetOptions
from models.unet import UNetOptions
from train.evaluation.attention import (
    class_activation,
    class_score,
    feature_layer,
    guided_backpropagation,
    summed_output,
)

SIZE = (32, 48)


def images(number: int = 3, channels: int = 1, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.rand(number, channels, *size, generator=torch.Generator().manual_seed(0))


def warmed(network: nn.Module, channels: int = 1) -> nn.Module:
    """With statistics of batch normalization that are not those of a fresh network."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(images(4, channels))
    return network.eval()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def diagnosis(name: str = "resnet18", channels: int = 1) -> nn.Module:
    return warmed(VR.build(name, channels=channels, num_classes=3), channels)


def segmentation() -> nn.Module:
    return warmed(SEG.build("unet", UNetOptions(features=4, norm="batch"), channels=1, num_classes=3))


def enhancement() -> nn.Module:
    network = IP.build("srresnet", SRResNetOptions(blocks=2, features=6), channels=1, scale=1)
    for parameter in network.parameters():  # the last convolution starts at zero
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def scaled(values: Tensor) -> Tensor:
    return torch.stack([each / each.max().clamp(min=1e-30) for each in values])


class TestClassActivation:
    @pytest.mark.parametrize(("name", "channels"), [("resnet18", 1), ("resnet50", 3)])
    def test_in_a_resnet_it_is_the_class_activation_map(self, name: str, channels: int) -> None:
        """Zhou et al. 2016: the features before the pooling, weighted by the class's row of the last layer."""
        network, given, classes = diagnosis(name, channels), images(channels=channels, size=(64, 96)), [2, 0, 1]
        features: list[Tensor] = []
        hook = network.avgpool.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
        with torch.no_grad():
            network(given)
        hook.remove()
        maps = torch.einsum("nkhw,nk->nhw", features[0], network.fc.weight[classes].detach()).relu()
        large = F.interpolate(maps[:, None], given.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        assert (large.amax((1, 2)) > 0).any()
        found = class_activation(network, given, torch.tensor(classes))
        torch.testing.assert_close(found, scaled(large), rtol=1e-4, atol=1e-5)
        assert found.shape == (3, 64, 96) and found.dtype == torch.float32
        assert found.amin() >= 0 and set(found.amax((1, 2)).tolist()) <= {0.0, 1.0}

    def test_in_a_unet_it_is_that_of_the_bottleneck(self) -> None:
        """Seg-Grad-CAM of all pixels, by autograd: the gradient of the class's logits by the features."""
        network, given = segmentation(), images()
        features: list[Tensor] = []
        layer = network.get_submodule(feature_layer(network, given[:1]))
        hook = layer.register_forward_hook(lambda module, inputs, output: features.append(output))
        score = network(given)[:, 1].sum()
        hook.remove()
        (gradient,) = torch.autograd.grad(score, features[0])
        assert features[0].shape[2:] == (2, 3), "five levels: a sixteenth"
        maps = (gradient.mean((2, 3), keepdim=True) * features[0]).sum(1).relu().detach()
        large = F.interpolate(maps[:, None], given.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        torch.testing.assert_close(class_activation(network, given, [1, 1, 1]), scaled(large), rtol=1e-4, atol=1e-5)

    def test_an_image_does_not_depend_on_those_beside_it(self) -> None:
        network, given = diagnosis(), images()
        together = class_activation(network, given, [0, 1, 2])
        alone = torch.cat([class_activation(network, given[n : n + 1], [n]) for n in range(3)])
        torch.testing.assert_close(together, alone)
        assert not torch.allclose(together[0], class_activation(network, given[:1], [1])[0], atol=0.05)

    def test_the_layer_is_found(self) -> None:
        class Functional(nn.Module):
            """Averages its features without a layer that does."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=2)
                self.head = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.second(self.first(x).relu()).mean((2, 3)))

        plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.Flatten())
        one = images(1)
        assert feature_layer(diagnosis("resnet18"), one) == "layer4"
        assert feature_layer(VR.build("resnet50", channels=1, num_classes=3).eval(), one) == "layer4"
        assert feature_layer(plain, one) == "1", "not the convolution behind the pooling"
        assert feature_layer(Functional(), one) == "second"
        assert feature_layer(segmentation(), one).startswith("down_4.")

    def test_nothing_that_speaks_for_a_class_is_a_map_of_zeros(self) -> None:
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
        with torch.no_grad():
            network[4].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        found = class_activation(network, images(1), [1])
        assert (found == 0).all()

    def test_what_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a class for each image"):
            class_activation(diagnosis(), images(), [0])
        with pytest.raises(ValueError, match="no convolution"):
            class_activation(nn.Sequential(nn.Flatten(), nn.Linear(32 * 48, 2)), images(1), [0])


def by_hand(network: nn.Module, given: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Guided backpropagation with rectifiers that are autograd functions of their own."""

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, below):
            ctx.save_for_backward(x, below)
            return torch.where(x > 0, x, x * below)

        @staticmethod
        def backward(ctx, gradient):
            x, below = ctx.saved_tensors
            derivative = torch.where(x > 0, torch.ones_like(x), below.expand_as(x))
            return torch.where(gradient > 0, gradient, 0) * derivative, None

    class Rectifier(nn.Module):
        def __init__(self, below: Tensor) -> None:
            super().__init__()
            self.below = below

        def forward(self, x: Tensor) -> Tensor:
            return Guided.apply(x, self.below)

    def exchange(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.LeakyReLU, nn.PReLU)):
                below = child.weight if isinstance(child, nn.PReLU) else getattr(child, "negative_slope", 0.0)
                setattr(module, name, Rectifier(torch.as_tensor(below).detach()))
            else:
                exchange(child)

    own = copy.deepcopy(network).eval()
    exchange(own)
    pixels = given.clone().requires_grad_()
    score(own(pixels)).sum().backward()
    assert pixels.grad is not None
    return scaled(pixels.grad.abs().amax(1))


class TestGuidedBackpropagation:
    def test_where_rectifiers_are_called_relu_it_is_monais(self) -> None:
        from collections import OrderedDict

        from monai.visualize import GuidedBackpropGrad

        layers = [
            ("first", nn.Conv2d(3, 6, 3)),
            ("relu1", nn.ReLU()),
            ("second", nn.Conv2d(6, 6, 3)),
            ("relu2", nn.ReLU()),
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flat", nn.Flatten()),
            ("last", nn.Linear(6, 3)),
        ]
        network, given, classes = nn.Sequential(OrderedDict(layers)), images(channels=3), [2, 0, 1]
        expected = [
            GuidedBackpropGrad(copy.deepcopy(network))(image.clone(), index=each)[0].abs().amax(0)
            for image, each in zip(given.split(1), classes, strict=True)
        ]
        found = guided_backpropagation(network, given, class_score(classes))
        torch.testing.assert_close(found, scaled(torch.stack(expected)), rtol=1e-4, atol=1e-5)
        assert found.shape == (3, *SIZE) and found.dtype == torch.float32

    def test_rectifiers_that_work_in_place_and_are_used_twice(self) -> None:
        """Those of a ResNet's blocks."""
        network, given, classes = diagnosis(channels=3), images(channels=3), [2, 0, 1]

        def logit(output: Tensor) -> Tensor:
            return output[range(3), classes]

        found = guided_backpropagation(network, given, class_score(classes))
        torch.testing.assert_close(found, by_hand(network, given, logit), rtol=1e-4, atol=1e-5)

    def test_learned_rectifiers_are_guided_too(self) -> None:
        network, given = enhancement(), images()
        found = guided_backpropagation(network, given, summed_output)
        torch.testing.assert_close(found, by_hand(network, given, lambda output: output.sum((1, 2, 3))))
        plain = given.clone().requires_grad_()
        network(plain).sum().backward()
        assert plain.grad is not None
        assert not torch.allclose(found, scaled(plain.grad.abs().amax(1)), atol=0.05), "the plain gradient"

    def test_a_segmentation_is_asked_about_the_pixels_of_its_class(self) -> None:
        network, given = segmentation(), images()
        with torch.no_grad():
            answers = network(given).argmax(1)
        classes = [int(each.flatten().mode().values) for each in answers]
        absent = next(each for each in range(4) if not (answers[0] == each).any())

        def mean(output: Tensor) -> Tensor:
            own = [
                logits[each][answer == each].mean()
                for logits, each, answer in zip(output, classes, answers, strict=True)
            ]
            return torch.stack(own)

        found = guided_backpropagation(network, given, class_score(classes))
        torch.testing.assert_close(found, by_hand(network, given, mean), rtol=1e-4, atol=1e-5)
        if absent < 3:
            one = guided_backpropagation(network, given[:1], class_score([absent]))
            torch.testing.assert_close(one, by_hand(network, given[:1], lambda output: output[:, absent].mean((1, 2))))

    def test_a_class_without_pixels_is_asked_about_everywhere(self) -> None:
        logits = torch.zeros(2, 3, 4, 5)
        logits[:, 0] = 1
        logits[1, 2, 0, 0] = 2.5
        logits[:, 2, 3, 4] = -4
        assert class_score([2, 2])(logits).tolist() == pytest.approx([-4 / 20, 2.5])

    def test_a_score_that_does_not_depend_on_the_image_is_a_map_of_zeros(self) -> None:
        network = enhancement()
        for score in (
            lambda output: output.detach().sum((1, 2, 3)).requires_grad_(),
            lambda output: 0 * summed_output(output),
        ):
            assert (guided_backpropagation(network, images(), score) == 0).all()

    def test_a_target_that_is_no_score_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"a score per image, \[3\], not \[3, 1, 32, 48\]"):
            guided_backpropagation(enhancement(), images(), lambda output: output)


@pytest.mark.parametrize("kind", ["activation", "guided"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_network_and_the_images_stay_as_they_are(kind: str, frozen: bool, without: Callable) -> None:
    network, given = diagnosis(), images()
    network.train()
    network.layer1.eval()  # some modes differ, as in a network whose normalization is frozen
    network.requires_grad_(not frozen)
    network.fc.bias.grad = torch.full_like(network.fc.bias, 3.0)
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    state, copied = copy.deepcopy(network.state_dict()), given.clone()
    modes = [module.training for module in network.modules()]
    inplace = [getattr(module, "inplace", None) for module in network.modules()]
    hooks = [(len(module._forward_hooks), len(module._backward_hooks)) for module in network.modules()]
    kinds = [type(module) for module in network.modules()]

    def maps(of: nn.Module) -> Tensor:
        if kind == "activation":
            return class_activation(of, given, [0, 1, 2])
        return guided_backpropagation(of, given, class_score([0, 1, 2]))

    with without():
        found = maps(network)
    assert seen, "the copy has the hooks of the network"
    torch.testing.assert_close(found, maps(copy.deepcopy(network).eval()))
    assert found.isfinite().all() and not found.requires_grad and (found.amax((1, 2)) == 1).any()
    assert [module.training for module in network.modules()] == modes
    assert [getattr(module, "inplace", None) for module in network.modules()] == inplace
    assert [(len(module._forward_hooks), len(module._backward_hooks)) for module in network.modules()] == hooks
    assert [type(module) for module in network.modules()] == kinds
    assert all(parameter.requires_grad != frozen for parameter in network.parameters())
    assert [name for name, parameter in network.named_parameters() if parameter.grad is not None] == ["fc.bias"]
    assert (network.fc.bias.grad == 3).all()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(given, copied) and not given.requires_grad and given.grad is None


def test_no_image_is_no_map() -> None:
    assert class_activation(diagnosis(), images(0), []).shape == (0, *SIZE)
    assert guided_backpropagation(enhancement(), images(0), summed_output).shape == (0, *SIZE)


def test_nan_is_not_hidden() -> None:
    given = images()
    given[1, 0, 5, 5] = math.nan
    found = class_activation(diagnosis(), given, [0, 0, 0])
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
