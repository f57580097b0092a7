"""UPerNet's head, the models of its configs, and the programs with one of them."""

import json
import shutil

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_sem_seg_head
from detectron2.utils.events import EventStorage
from detectron2.utils.video_visualizer import VideoVisualizer
from torch import nn
from torch.nn import functional as F

from carafe_d2 import CARAFEPack, UPerNetHead, add_carafe_config, train_net
from carafe_d2.config import load_config
from carafe_d2.errors import UserError
from carafe_d2.inference import Predictor, draw_prediction, read_image
from carafe_d2.upsample import UPSAMPLERS
from tools import predict, visualize

CHANNELS = {"res2": 4, "res3": 6, "res4": 8, "res5": 12}
SHAPES = {
    name: ShapeSpec(channels=channels, stride=2**i)
    for i, (name, channels) in enumerate(CHANNELS.items(), start=2)
}
PARTS = ("PPM", "FPN", "FUSE")


def build(**keys):
    """A head of 16 channels and 5 classes, with given keys of MODEL.UPERNET."""
    cfg = get_cfg()
    add_carafe_config(cfg)
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME, head.IN_FEATURES = "UPerNetHead", list(SHAPES)
    head.NUM_CLASSES, head.CONVS_DIM, head.NORM = 5, 16, "BN"
    cfg.merge_from_list([x for k, v in keys.items() for x in (f"MODEL.UPERNET.{k}", v)])
    torch.manual_seed(0)
    return build_sem_seg_head(cfg, SHAPES)


def all_parts(upsample):
    return {f"{part}_UPSAMPLE": upsample for part in PARTS}


def features(height=64, width=96):
    """Maps of two images, each of half the size of the one before, rounded up."""
    torch.manual_seed(1)
    maps, stride = {}, 4
    for name, channels in CHANNELS.items():
        maps[name] = torch.randn(2, channels, -(-height // stride), -(-width // stride))
        stride *= 2
    return maps


def with_lively_kernels(head):
    """As initialized, CARAFE is nearly a mean, and says little of what it was given."""
    for module in head.modules():
        if isinstance(module, CARAFEPack):
            nn.init.normal_(module.content_encoder.weight, std=0.3)
    return head


@pytest.mark.parametrize("upsample", UPSAMPLERS)
def test_every_choice_puts_out_scores_and_gives_every_parameter_a_gradient(upsample):
    head = build(**all_parts(upsample))
    _, losses = head(features(), torch.randint(5, (2, 64, 96)))
    losses["loss_sem_seg"].backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    scores, losses = head.eval()(features())
    assert scores.shape == (2, 5, 64, 96)
    assert losses == {}


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 130)])
def test_sizes_that_the_strides_do_not_divide(size):
    for upsample in ("carafe", "bilinear"):
        head = build(**all_parts(upsample))
        _, losses = head(features(*size), torch.randint(5, (2, *size)))
        assert torch.isfinite(losses["loss_sem_seg"])
        scores, _ = head.eval()(features(*size))
        assert scores.shape[-2] >= size[0] and scores.shape[-1] >= size[1]


def bilinear(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def written_out(head, maps, *, ppm, fpn, fuse):
    """What ``head.layers`` computes, from its weights, with given upsampling.

    ``ppm`` and ``fpn`` take a map and its number, ``fuse`` the levels from fine to coarse.
    """

    def conv(layer, x):
        norm = layer.norm
        x = F.conv2d(x, layer.weight, padding=layer.weight.shape[-1] // 2)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return F.relu(x)

    c2, c3, c4, c5 = maps.values()
    pools = [
        conv(head.ppm_conv[i], ppm(F.adaptive_avg_pool2d(c5, side), i))
        for i, side in enumerate((1, 2, 3, 6))
    ]
    p5 = conv(head.ppm_output, torch.cat([c5, *pools], dim=1))
    t4 = conv(head.fpn_lateral[0], c4) + fpn(p5, 0)
    t3 = conv(head.fpn_lateral[1], c3) + fpn(t4, 1)
    t2 = conv(head.fpn_lateral[2], c2) + fpn(t3, 2)
    p4, p3, p2 = (conv(head.fpn_output[i], t) for i, t in enumerate((t4, t3, t2)))
    fused = conv(head.fuse_output, fuse(p2, p3, p4, p5))
    return F.conv2d(fused, head.predictor.weight, head.predictor.bias)


def test_with_bilinear_it_is_the_official_network():
    """Pools and levels are enlarged to the full size in one step."""
    head, maps = build(**all_parts("bilinear")).eval(), features()
    expected = written_out(
        head,
        maps,
        ppm=lambda x, i: bilinear(x, (2, 3)),
        fpn=lambda x, i: bilinear(x, (x.shape[-2] * 2, x.shape[-1] * 2)),
        fuse=lambda p2, *coarser: torch.cat([p2, *(bilinear(x, (16, 24)) for x in coarser)], 1),
    )
    torch.testing.assert_close(head.layers([*maps.values()]), expected)


def test_with_carafe_every_step_of_two_has_kernels_of_its_own():
    head, maps = with_lively_kernels(build().eval()), features(height=96)

    def fuse(p2, p3, p4, p5):
        x = torch.cat([p4, head.fuse_upsample[0](p5)], dim=1)
        x = torch.cat([p3, head.fuse_upsample[1](x)], dim=1)
        return torch.cat([p2, head.fuse_upsample[2](x)], dim=1)

    expected = written_out(
        head,
        maps,
        # The map of 3 x 3 cells is upsampled from 2 x 2.
        ppm=lambda x, i: head.ppm_upsample[i](bilinear(x, (2, 2)))[..., :3, :3],
        fpn=lambda x, i: head.fpn_upsample[i](x),
        fuse=fuse,
    )
    torch.testing.assert_close(head.layers([*maps.values()]), expected)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_its_own_key(part):
    head = build(**{**all_parts("bilinear"), f"{part}_UPSAMPLE": "carafe"})
    packs = [name for name, module in head.named_modules() if isinstance(module, CARAFEPack)]
    count = 4 if part == "PPM" else 3
    assert packs == [f"{part.lower()}_upsample.{i}" for i in range(count)]


def test_loss_is_taken_in_the_middle_of_the_cells_of_the_scores():
    head = build()
    targets = torch.full((2, 63, 95), 255)  # the last cells are cut behind their middle
    targets[:, 2::4, 2::4] = torch.randint(5, (2, 16, 24))
    maps = features(63, 95)
    scores = head.layers([*maps.values()])
    expected = F.cross_entropy(scores, targets[:, 2::4, 2::4])
    torch.testing.assert_close(head(maps, targets)[1]["loss_sem_seg"], expected)
    everywhere = targets[:, 2::4, 2::4].repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(head(maps, everywhere[:, :63, :95])[1]["loss_sem_seg"], expected)
    cut = targets.clone()
    cut[:, :, 61:] = 255
    expected = F.cross_entropy(scores, cut[:, 2::4, 2::4], ignore_index=255)
    torch.testing.assert_close(head(maps, cut[:, :, :61])[1]["loss_sem_seg"], expected)


def test_auxiliary_loss_comes_from_the_second_coarsest_map():
    head, maps = build(AUX_LOSS_WEIGHT=0.4), features()
    _, losses = head(maps, torch.randint(5, (2, 64, 96)))
    assert losses.keys() == {"loss_sem_seg", "loss_sem_seg_aux"}
    losses["loss_sem_seg_aux"].backward()
    with_gradient = {n.split(".")[0] for n, p in head.named_parameters() if p.grad is not None}
    assert with_gradient == {"aux_predictor"}
    unweighted = build(AUX_LOSS_WEIGHT=1.0).train()
    unweighted.load_state_dict(head.state_dict())
    for each in (head, unweighted):
        each.aux_predictor[1].p = 0.0  # dropout
    targets = torch.randint(5, (2, 64, 96))
    ours, theirs = (each(maps, targets)[1]["loss_sem_seg_aux"] for each in (head, unweighted))
    torch.testing.assert_close(ours, 0.4 * theirs)


def test_head_without_config():
    head = UPerNetHead(
        {"a": ShapeSpec(channels=4, stride=8), "b": ShapeSpec(channels=6, stride=16)},
        num_classes=3,
        conv_dims=8,
        pool_scales=(1, 2),
        fpn_upsampler={"name": "nearest"},
        fuse_upsampler={"name": "carafe", "up_kernel": 3},
    )
    assert [pack.up_kernel for pack in head.modules() if isinstance(pack, CARAFEPack)] == [5, 5, 3]
    scores, _ = head.eval()({"a": torch.randn(1, 4, 8, 6), "b": torch.randn(1, 6, 4, 3)})
    assert scores.shape == (1, 3, 64, 48)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PPM_UPSAMPLE", "lanczos"),
        ("FPN_UPSAMPLE", "lanczos"),
        ("FUSE_UPSAMPLE", "lanczos"),
        ("AUX_LOSS_WEIGHT", -1.0),
    ],
)
def test_wrong_config_values_are_named(key, value):
    with pytest.raises(UserError, match=f"MODEL.UPERNET.{key} must .*{value}"):
        build(**{key: value})


def test_maps_that_do_not_halve_the_resolution_are_refused():
    maps = {"res2": SHAPES["res2"], "res4": SHAPES["res4"]}
    for each in (maps, {"res2": SHAPES["res2"]}):
        with pytest.raises(ValueError, match="must each halve the resolution"):
            UPerNetHead(each, num_classes=3, conv_dims=8)


# ----------------------------------------------------------------------- a model of the configs

CONFIG = "upernet_R50_ade20k_carafe_1x.yaml"
SMALL = [
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16"),
    *("MODEL.CARAFE.COMPRESSED_CHANNELS", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("INPUT.MIN_SIZE_TEST", "64"),
]
SHAPES_DATA = [
    *("DATASETS.TRAIN", "('shapes_sem_seg_train',)", "DATASETS.TEST", "('shapes_sem_seg_val',)"),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4"),
    *("SOLVER.CHECKPOINT_PERIOD", "2", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
]


@pytest.mark.parametrize("upsample", ["carafe", "bilinear"])
def test_losses_of_the_model_go_down(upsample):
    """Images of different sizes, which the strides do not divide."""
    parts = [x for part in PARTS for x in (f"MODEL.UPERNET.{part}_UPSAMPLE", upsample)]
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG, [*SMALL, *parts]))
    images = []
    for height, width in ((72, 100), (96, 61)):
        labels = torch.full((height, width), 2)
        labels[: height // 2] = 1
        images.append({"image": 255.0 * (labels == 1).expand(3, -1, -1), "sem_seg": labels})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    with EventStorage():
        for _ in range(3):
            (loss,) = model(images).values()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        outputs = model.eval()([{**images[0], "height": 144, "width": 200}, images[1]])
    assert [o["sem_seg"].shape for o in outputs] == [(150, 144, 200), (150, 96, 61)]


@pytest.fixture(scope="module")
def trained(register_shapes, tmp_path_factory):
    """The output folder of a finished training of four iterations."""
    register_shapes(train=4, val=3)
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


def train(folder, *options):
    keys = [*SMALL, *SHAPES_DATA, "OUTPUT_DIR", str(folder)]
    train_net.run(["--config-file", CONFIG, *options, *keys])


def metrics_of(folder):
    """The last learning rate, and what the evaluation found."""
    metrics = {}
    for line in (folder / "metrics.json").open():
        metrics.update(json.loads(line))
    return {key: metrics[key] for key in ("lr", "sem_seg/mIoU", "sem_seg/pACC")}


def test_training_ends_with_an_evaluation(trained):
    metrics = metrics_of(trained)
    assert 0 < metrics["sem_seg/mIoU"] < 100 and 0 < metrics["sem_seg/pACC"] < 100
    assert metrics["lr"] == pytest.approx(0.02 * 0.25**0.9)


def test_resumed_training_gives_the_same_weights(trained, tmp_path):
    shutil.copy(trained / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    train(tmp_path, "--resume")
    ours, theirs = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (tmp_path, trained)
    )
    assert ours["iteration"] == theirs["iteration"] == 3
    for key, weight in theirs["model"].items():
        assert torch.equal(ours["model"][key], weight), key
    assert metrics_of(tmp_path) == metrics_of(trained)


def test_programs_draw_the_classes_of_pixels(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [*SMALL, *SHAPES_DATA, "MODEL.WEIGHTS", str(trained / "model_final.pth")]
    cfg = load_config(CONFIG, keys)
    image = DatasetCatalog.get("shapes_sem_seg_val")[0]["file_name"]
    predictor, pixels = Predictor(cfg), read_image(image)
    (labels,) = predictor([pixels])
    assert labels.shape == (64, 64) and 0 <= labels.min() <= labels.max() < 7
    frame = draw_prediction(VideoVisualizer(predictor.metadata), pixels, labels).get_image()
    assert frame.shape == pixels.shape and (frame != pixels).any()

    predict.main(["--config-file", CONFIG, "--input", image, "--output", "out", *keys])
    drawn = read_image(tmp_path / "out" / "000000.png").astype(int)
    assert (abs(drawn - pixels) > 20).mean() > 0.2
    visualize.main(["--config-file", CONFIG, "--width", "100", "--output", "sheet.png", *keys])
    assert read_image("sheet.png").shape == (2 * (128 + 8), 2 * (208 + 24) - 24, 3)

    for options, message in (
        (["--json", *keys], "--json saves detections, but this model tells only the classes"),
        ([*keys, "DATASETS.TEST", "('shapes_val',)"], "tells 7 classes .* the dataset has 0; set"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            predict.main(["--config-file", CONFIG, "--input", image, "--output", "out", *options])


def test_missing_ade20k_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as exit:
        train_net.run(["--config-file", CONFIG, *SMALL, "OUTPUT_DIR", str(tmp_path)])
    message = exit.value.code
    assert message.startswith("error: dataset 'ade20k_sem_seg_train': ")
    assert "ADEChallengeData2016" in message and "DETECTRON2_DATASETS" in message
    assert "\n" not in message
