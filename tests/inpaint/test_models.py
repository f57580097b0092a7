"""The two inpainting models: their networks, masks, losses and configs."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from carafe_d2 import CARAFEPack
from carafe_d2.config import load_config
from carafe_d2.errors import UserError
from carafe_d2.inpaint.global_local import GlobalLocalInpainter, windows_around
from carafe_d2.inpaint.losses import gram, total_variation
from carafe_d2.inpaint.partial_conv import PartialConv2d, PartialConvInpainter, upsample_masked
from carafe_d2.upsample import UPSAMPLERS, build_upsampler

MODELS = ("global_local", "partial_conv")
CONFIGS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "configs").glob("*inpaint*.yaml")
)
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.INPAINT.CROP_SIZE", "32", "MODEL.INPAINT.LOCAL_SIZE", "16"),
    *("MODEL.INPAINT.HOLE_SIZE", "(8,12)", "MODEL.INPAINT.CHANNELS", "4"),
    *("MODEL.INPAINT.NUM_LEVELS", "4", "MODEL.CARAFE.COMPRESSED_CHANNELS", "8"),
]


def build(model, *options):
    torch.manual_seed(0)
    return build_model(load_config(f"inpaint_{model}_carafe_places", [*SMALL, *map(str, options)]))


def batch(size=32, count=2):
    torch.manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    masks[:, 8:20, 10:18] = True
    return [{"image": image, "mask": mask} for image, mask in zip(images, masks, strict=True)]


def with_lively_kernels(model):
    """As initialized, CARAFE is nearly a mean, and says little of what it was given."""
    for module in model.modules():
        if isinstance(module, CARAFEPack):
            nn.init.normal_(module.content_encoder.weight, std=0.3)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_the_model_of_its_name(name):
    cfg = load_config(name, SMALL)
    assert f"output/{name}" == cfg.OUTPUT_DIR
    model = build_model(cfg)
    kind = GlobalLocalInpainter if "global_local" in name else PartialConvInpainter
    assert isinstance(model, kind)
    packs = sum(isinstance(module, CARAFEPack) for module in model.modules())
    assert packs == (2 if kind is GlobalLocalInpainter else 4) * ("carafe" in name)
    assert all(torch.isfinite(loss) for loss in model(batch(), "completion").values())


@pytest.mark.parametrize("model", MODELS)
def test_baselines_differ_in_the_upsamplers_only(model):
    baseline, carafe = (load_config(f"inpaint_{model}{s}_places", SMALL) for s in ("", "_carafe"))
    for cfg in (baseline, carafe):
        cfg.defrost()
        cfg.OUTPUT_DIR = cfg.MODEL.INPAINT.UPSAMPLE = ""
    assert baseline == carafe


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("upsample", UPSAMPLERS)
def test_every_choice_trains_all_its_parameters_and_fills_holes_only(model, upsample):
    inpainter = build(model, "MODEL.INPAINT.UPSAMPLE", upsample)
    for part in ("discriminators", "generator"):
        losses = inpainter(batch(), part)
        sum(losses.values()).backward()
    assert [name for name, p in inpainter.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        outputs = inpainter.eval()(batch())
    for given, output in zip(batch(), outputs, strict=True):
        filled, hole = output["inpainted"], given["mask"]
        assert filled.shape == (3, 32, 32) and 0 <= filled.min() <= filled.max() <= 255
        assert torch.equal(filled[:, ~hole], given["image"][:, ~hole].float())
        assert (filled[:, hole] != given["image"][:, hole]).float().mean() > 0.9


@pytest.mark.parametrize("model", MODELS)
def test_what_lies_in_the_hole_is_not_seen(model):
    inpainter = with_lively_kernels(build(model)).eval()
    images = batch()
    with torch.no_grad():
        expected = inpainter(images)
        for each in images:
            each["image"][:, each["mask"]] = 255 - each["image"][:, each["mask"]]
        for ours, theirs in zip(inpainter(images), expected, strict=True):
            assert torch.equal(ours["inpainted"], theirs["inpainted"])


@pytest.mark.parametrize("model", MODELS)
def test_losses_go_down(model):
    inpainter = build(model)
    optimizer = torch.optim.AdamW(inpainter.parameters(), lr=0.01, weight_decay=0.0)
    images, losses = batch(), []
    for each in images:
        each["image"][:] = torch.tensor([200, 100, 50]).view(3, 1, 1)
    for _ in range(8):
        total = sum(inpainter(images, "completion").values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.7 * losses[0]


# --- Global&Local -------------------------------------------------------------------------------


def test_baseline_has_the_layers_of_the_published_table():
    model = build_model(load_config("inpaint_global_local_places", ["MODEL.DEVICE", "meta"]))
    convs = [m for m in model.completion.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    found = [(m.out_channels, m.kernel_size[0], m.stride[0], m.dilation[0]) for m in convs]
    assert found == [
        *((64, 5, 1, 1), (128, 3, 2, 1), (128, 3, 1, 1), (256, 3, 2, 1)),
        *[(256, 3, 1, 1)] * 2,
        *((256, 3, 1, 2), (256, 3, 1, 4), (256, 3, 1, 8), (256, 3, 1, 16)),
        *[(256, 3, 1, 1)] * 2,
        *((128, 4, 2, 1), (128, 3, 1, 1), (64, 4, 2, 1), (32, 3, 1, 1), (3, 3, 1, 1)),
    ]
    for network, widths in (
        (model.discriminators.of_image, [64, 128, 256, 512, 512, 512]),
        (model.discriminators.of_window, [64, 128, 256, 512, 512]),
    ):
        convs = [m for m in network if isinstance(m, nn.Conv2d)]
        assert [(m.out_channels, m.kernel_size, m.stride) for m in convs] == [
            (width, (5, 5), (2, 2)) for width in widths
        ]
        assert (network[-2].in_features, network[-2].out_features) == (512 * 16, 1024)


def test_parts_take_turns_and_get_gradients_of_their_own_losses():
    model = build("global_local", "MODEL.INPAINT.COMPLETION_ITERS", 3)
    model.discriminator_iters = 2
    assert [model.turns(i) for i in (0, 2, 3, 4, 5, 99)] == [
        *[("completion",)] * 2,
        *[("discriminators",)] * 2,
        *[("discriminators", "generator")] * 2,
    ]
    for part, trained in (
        ("completion", "completion"),
        ("discriminators", "discriminators"),
        ("generator", "completion"),
    ):
        model.zero_grad()
        sum(model(batch(), part).values()).backward()
        found = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert found == {trained}


def test_verdict_reaches_the_completion_network_with_its_weight():
    gradients = []
    for weight in (0.0, 1.0, 2.0):
        model = build("global_local", "MODEL.INPAINT.ADVERSARIAL_WEIGHT", weight)
        sum(model(batch(), "generator").values()).backward()
        gradients.append(model.completion.layers[0].weight.grad)
    none, one, two = gradients
    assert not torch.allclose(one, none)
    torch.testing.assert_close(two - none, 2 * (one - none), rtol=1e-3, atol=1e-6)


def test_windows_have_the_hole_in_their_middle_where_the_image_allows():
    holes = torch.zeros(3, 1, 20, 24)
    holes[0, :, 8:12, 9:15] = 1
    holes[1, :, 0:3, 22:24] = 1
    holes[2, :, 17:20, 1:2] = 1
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(24), indexing="ij")
    images = torch.stack([rows, columns]).expand(3, -1, -1, -1)
    windows = windows_around(holes, images, 10)
    assert windows.shape == (3, 2, 10, 10)
    assert windows[:, :, 0, 0].tolist() == [[5, 7], [0, 14], [10, 0]]
    assert windows[:, :, -1, -1].tolist() == [[14, 16], [9, 23], [19, 9]]


# --- partial convolutions -----------------------------------------------------------------------


def test_baseline_is_the_published_unet():
    model = build_model(load_config("inpaint_partial_conv_places", ["MODEL.DEVICE", "meta"]))
    layers = [*model.network.encoder, *model.network.decoder]
    found = [(m.conv.in_channels, m.conv.out_channels, m.conv.kernel_size[0]) for m in layers]
    assert found == [
        *((3, 64, 7), (64, 128, 5), (128, 256, 5), (256, 512, 3)),
        *[(512, 512, 3)] * 4,
        *[(1024, 512, 3)] * 4,
        *((768, 256, 3), (384, 128, 3), (192, 64, 3), (67, 3, 3)),
    ]
    assert [m.norm is None for m in layers] == [True, *[False] * 14, True]


def test_partial_convolution_is_that_of_the_paper():
    """Window by window, for two maps whose channels are taken together."""
    torch.manual_seed(0)
    layer = PartialConv2d(2 + 3, 4, 3, stride=2)
    nn.init.normal_(layer.bias)
    masks = [(torch.rand(1, 1, 7, 6) < share).float() for share in (0.2, 0.1)]
    masks = [
        mask.expand(-1, channels, -1, -1) for mask, channels in zip(masks, (2, 3), strict=True)
    ]
    maps = [torch.randn(mask.shape) * mask for mask in masks]
    output, valid = layer([(x, mask[:, :1]) for x, mask in zip(maps, masks, strict=True)])
    assert output.shape == (1, 4, 4, 3) and valid.shape == (1, 1, 4, 3)
    x, m = (F.pad(torch.cat(each, 1), (1, 1, 1, 1)) for each in (maps, masks))
    for i in range(4):
        for j in range(3):
            window, seen = (t[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] for t in (x, m))
            expected = torch.zeros(4)
            if seen.sum():
                total = (layer.conv.weight * window * seen).sum((1, 2, 3))
                expected = total * (seen.numel() / seen.sum()) + layer.bias.flatten()
            torch.testing.assert_close(output[0, :, i, j], expected)
            assert valid[0, 0, i, j] == (seen.sum() > 0)
    assert 0 < valid.sum() < valid.numel()


@pytest.mark.parametrize("up_group", [1, 2])
def test_masks_are_reassembled_with_the_kernels_of_the_map(up_group):
    torch.manual_seed(0)
    pack = with_lively_kernels(build_upsampler("carafe", 4, up_group=up_group))
    mask = (torch.rand(2, 1, 5, 6) < 0.04).float()
    x = torch.randn(2, 4, 5, 6) * mask
    upsampled, shares = upsample_masked(pack, (x, mask))
    assert torch.equal(upsampled, pack(x))
    assert not shares.requires_grad
    logits = pack.content_encoder(pack.channel_compressor(x))
    kernels = pack.masks(logits).unflatten(1, (up_group, 25))
    windows = F.unfold(mask, 5, padding=2).view(2, 1, 25, 5, 6)
    windows = windows.repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert torch.equal(shares, ((kernels * windows).sum(2) > 0).float())
    assert (
        0 < shares.mean() < 1
        and (upsampled * (shares.repeat_interleave(4 // up_group, 1) == 0) == 0).all()
    )


@pytest.mark.parametrize("name", ["nearest", "bilinear", "deconv", "pixel_shuffle"])
def test_other_upsamplers_leave_nothing_in_holes(name):
    torch.manual_seed(0)
    upsampler = build_upsampler(name, 4)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    upsampled, shares = upsample_masked(upsampler, (torch.randn(1, 4, 6, 6) * mask, mask))
    assert upsampled.shape == (1, 4, 12, 12) and shares.shape == (1, 1, 12, 12)
    assert (shares[..., :5] == 1).all() and (shares[..., 7:] == 0).all()
    assert (upsampled * (shares == 0) == 0).all() and (upsampled[..., :5] != 0).all()


def test_frozen_norms_of_the_encoder_keep_their_statistics():
    model = build("partial_conv", "MODEL.INPAINT.FREEZE_ENCODER_NORM", True).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(batch())
    changed = {
        name.split(".")[1]
        for name, value in model.named_buffers()
        if not torch.equal(value, before[name])
    }
    assert changed == {"decoder"}


def test_losses_are_those_of_the_paper():
    model = build("partial_conv").eval()
    images, holes = torch.randn(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)
    holes[:, :, 8:20, 10:18] = 1
    completed = model.complete(images, holes)
    losses = model.losses(images, holes, "generator")
    error = (completed - images).abs()
    inside = error[..., 8:20, 10:18].sum()
    torch.testing.assert_close(losses["loss_hole"], 6 * inside / error.numel())
    torch.testing.assert_close(losses["loss_valid"], (error.sum() - inside) / error.numel())
    filled = torch.where(holes > 0, completed, images)[..., 7:21, 9:19]
    variation = filled.diff(dim=2).abs().sum() + filled.diff(dim=3).abs().sum()
    torch.testing.assert_close(losses["loss_tv"], 0.1 * variation / error.numel())
    assert total_variation(images, holes * 0) == 0


def test_perceptual_losses_take_their_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    widths = {0: (3, 2), 2: (2, 2), 5: (2, 4), 7: (4, 4), 10: (4, 4), 12: (4, 4), 14: (4, 5)}
    weights = {}
    for i, (before, after) in widths.items():
        weights[f"features.{i}.weight"] = torch.randn(after, before, 3, 3)
        weights[f"features.{i}.bias"] = torch.randn(after)
    weights["classifier.0.weight"] = torch.zeros(1)
    path = tmp_path / "vgg16.pth"
    torch.save(weights, path)
    plain, model = build("partial_conv"), build("partial_conv", "MODEL.INPAINT.VGG_WEIGHTS", path)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len([*model.parameters()]) == len([*plain.parameters()])
    losses = model(batch())
    assert losses.keys() - plain(batch()).keys() == {"loss_perceptual", "loss_style"}
    losses["loss_style"].backward()
    assert model.network.encoder[0].conv.weight.grad.abs().sum() > 0

    images = torch.rand(3, 1, 3, 16, 16) * 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    maps = (images.flatten(0, 1) / 255 - mean) / std
    perceptual = style = 0
    for i in widths:
        weight, bias = (weights[f"features.{i}.{kind}"] for kind in ("weight", "bias"))
        maps = F.relu(F.conv2d(maps, weight, bias, padding=1))
        if i in (2, 7, 14):
            maps = F.max_pool2d(maps, 2)
            for ours in maps[:2]:
                perceptual += (ours - maps[2]).abs().mean()
                style += (gram(ours[None]) - gram(maps[2:])).abs().mean()
    torch.testing.assert_close(model.perceptual(*images), (perceptual, style))
    flat = maps[0].flatten(1)
    torch.testing.assert_close(gram(maps)[0], flat @ flat.T / flat.numel())

    torch.save({**weights, "features.16.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"VGG_WEIGHTS: .* is not torchvision's VGG-16"):
        build("partial_conv", "MODEL.INPAINT.VGG_WEIGHTS", path)


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "key", "value", "message"),
    [
        ("global_local", "INPAINT.UPSAMPLE", "lanczos", "must be one of carafe, .*'lanczos'"),
        ("partial_conv", "INPAINT.UPSAMPLE", "lanczos", "must be one of carafe, .*'lanczos'"),
        ("global_local", "INPAINT.CROP_SIZE", 30, "must be a multiple of 4 .* got 30"),
        ("partial_conv", "INPAINT.CROP_SIZE", 40, "must be a multiple of 16 .* got 40"),
        ("global_local", "INPAINT.LOCAL_SIZE", 48, "must be at most CROP_SIZE, 32, got 48"),
        ("global_local", "INPAINT.ADVERSARIAL_WEIGHT", -1.0, "must be at least 0, got -1"),
        ("partial_conv", "INPAINT.NUM_LEVELS", 0, "must be at least 1, got 0"),
        ("partial_conv", "INPAINT.CHANNELS", 0, "must be at least 1, got 0"),
        ("partial_conv", "CARAFE.NORMALIZER", "none", "must be softmax or normalized_sigmoid"),
        ("partial_conv", "CARAFE.UP_GROUP", 3, "= 3 must divide the 4 channels"),
    ],
)
def test_wrong_config_values_are_named(model, key, value, message):
    with pytest.raises(UserError, match=f"^MODEL.{key} {message}"):
        build(model, f"MODEL.{key}", value)


def test_input_that_does_not_fit_is_named():
    model = build("partial_conv").eval()
    with pytest.raises(UserError, match="an inpainting model needs images with holes"):
        model([{"image": torch.zeros(3, 32, 32)}])
    with pytest.raises(UserError, match=r"images of 24 x 24 pixels: .* multiples of 16"):
        model(batch(size=24))
