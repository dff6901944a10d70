"""Figures: what they show is read back from matplotlib's objects, not from pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.figure
import matplotlib.text
import numpy as np
import pytest
import torch
from PIL import Image

from train.errors import RunError
from train.outputs import figures
from train.outputs.figures import save_gate, save_panel


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[matplotlib.figure.Figure]]:
    """The figures that are saved."""
    saved: list[matplotlib.figure.Figure] = []
    save = figures._save

    def spy(figure: matplotlib.figure.Figure, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "_save", spy)
    return saved


def texts(figure: matplotlib.figure.Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def batch(channels: int = 1, n: int = 3) -> dict[str, torch.Tensor]:
    clean = torch.full((n, channels, 24, 20), 0.5)
    return {"clean": clean, "degraded": clean + 0.1, "enhanced": clean + 0.01}


class TestPanel:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_images_captions_and_labels(self, tmp_path: Path, drawn: list, channels: int) -> None:
        images = batch(channels)
        labels = ["COVID", "NonCOVID", "COVID"]
        save_panel(tmp_path / "panel.png", **images, title="the title", source="real", labels=labels)
        with Image.open(tmp_path / "panel.png") as image:
            assert image.format == "PNG"
            assert min(image.size) > 600
        said = texts(drawn[0])
        assert said.count("PSNR 20.00 dB") == 3  # 0.1 off everywhere
        assert said.count("PSNR 40.00 dB") == 3
        assert said.count("mean error 0.010") == 3
        assert {"the title", "clean", "degraded", "enhanced", *labels} <= set(said)
        assert not any("PHANTOM" in text for text in said)
        shown = [image.get_array() for axes in drawn[0].axes for image in axes.images]
        np.testing.assert_allclose(shown[1], 0.6, atol=1e-6)
        np.testing.assert_allclose(shown[3], 0.01, atol=1e-6)

    def test_a_long_label_stays_beside_its_image(self, tmp_path: Path, drawn: list) -> None:
        labels = ["pigmented benign keratosis, 50th percentile", "x" * 100, "short"]
        save_panel(tmp_path / "panel.png", **batch(), title="t", source="real", labels=labels)
        [figure] = drawn
        height = figure.axes[0].get_window_extent().height
        boxes = [axes.yaxis.label.get_window_extent() for axes in figure.axes if axes.get_ylabel()]
        assert len(boxes) == 3
        assert all(box.height <= height and box.x0 >= 0 for box in boxes)

    def test_phantoms_are_called_so(self, tmp_path: Path, drawn: list) -> None:
        save_panel(tmp_path / "panel.png", **batch(n=1), title="t", source="phantom")
        assert any("PHANTOM" in text for text in texts(drawn[0]))

    def test_what_lies_outside_the_range_is_clamped_everywhere(self, tmp_path: Path, drawn: list) -> None:
        images = batch(n=1)
        images |= {"clean": torch.ones_like(images["clean"]), "enhanced": images["enhanced"] + 5}
        save_panel(tmp_path / "panel.png", **images, title="t", source="real")
        assert "PSNR ≥ 60 dB" in texts(drawn[0])
        assert "mean error 0.000" in texts(drawn[0])

    @pytest.mark.parametrize("spoiled", [slice(0, 1), slice(None)])
    def test_nan_is_said(self, tmp_path: Path, drawn: list, spoiled: slice) -> None:
        images = batch(n=2)
        images["enhanced"][spoiled] = math.nan
        save_panel(tmp_path / "panel.png", **images, title="t", source="real")
        assert texts(drawn[0]).count("PSNR undefined: NaN") == len(images["enhanced"][spoiled])
        assert not any("nan dB" in text or "mean error nan" in text for text in texts(drawn[0]))

    def test_names_are_no_formulas(self, tmp_path: Path, drawn: list) -> None:
        r"""``$\frac$`` would not even be drawn; a user's own style may ask for LaTeX."""
        names = [r"a$b_c^d$", r"$\frac$", "two\nlines \udcff"]
        with matplotlib.rc_context({"text.usetex": True, "text.parse_math": True}):
            save_panel(tmp_path / "panel.png", **batch(), title=names[1], source="real", labels=names)
            save_gate(tmp_path / "g.png", step=[1, 2], cosine=[0.1, 0.2], gate=[1, 1], title=names[2], source="real")
        panel, gate = (texts(figure) for figure in drawn)
        assert {*names[:2], r"two\nlines \xff"} <= set(panel)
        assert r"two\nlines \xff" in gate
        every = [text for figure in drawn for text in figure.findobj(matplotlib.text.Text)]
        assert not any(text.get_parse_math() or text.get_usetex() for text in every)

    def test_other_shapes_are_refused(self, tmp_path: Path) -> None:
        images = batch()
        with pytest.raises(ValueError, match="shape"):
            save_panel(
                tmp_path / "panel.png", **(images | {"enhanced": images["enhanced"][:2]}), title="t", source="real"
            )
        with pytest.raises(ValueError, match="N > 0"):
            save_panel(tmp_path / "panel.png", **batch(n=0), title="t", source="real")


class TestGate:
    def test_dots_mean_and_share(self, tmp_path: Path, drawn: list) -> None:
        step = np.arange(1, 201)
        cosine = np.where(step % 4 == 0, -0.2, 0.1)
        cosine[9] = np.nan  # a skipped step
        gate = np.where(np.isnan(cosine), np.nan, cosine >= 0)
        save_gate(tmp_path / "gate.png", step=step, cosine=cosine, gate=gate, title="t", source="phantom")
        above, below = drawn[0].axes
        opened, closed = (dots.get_offsets() for dots in above.collections)
        assert (len(opened), len(closed)) == (149, 50)
        assert (closed[:, 1] == -0.2).all()
        said = texts(drawn[0])
        assert any("74.9%" in text for text in said)
        assert any("PHANTOM" in text for text in said)
        zero, mean = above.lines
        assert list(zero.get_ydata()) == [0, 0]
        known = np.isfinite(cosine)
        window = cosine[known][100:103]  # steps are averaged over 3, a fiftieth of them
        assert mean.get_ydata()[101] == pytest.approx(window.mean())
        assert below.patches[0].get_data().values[101] == pytest.approx((window >= 0).mean())
        assert (tmp_path / "gate.png").stat().st_size > 5000

    @pytest.mark.parametrize("cosine", [None, np.full(30, np.nan)])
    def test_without_a_gate_it_says_so(self, tmp_path: Path, drawn: list, cosine: np.ndarray | None) -> None:
        save_gate(tmp_path / "gate.png", step=range(30), cosine=cosine, gate=cosine, title="t", source="real")
        assert any("no gate in this run" in text for text in texts(drawn[0]))

    @pytest.mark.parametrize("steps", [1, 2, 30, 99])
    def test_dots_of_short_runs_are_seen(self, tmp_path: Path, drawn: list, steps: int) -> None:
        """In the picture itself: every step has pixels of its gate's color, and no line runs through them."""
        gate = np.arange(steps) % 2
        cosine = np.where(gate, 0.2, -0.1)
        save_gate(tmp_path / "g.png", step=range(1, steps + 1), cosine=cosine, gate=gate, title="t", source="real")
        [figure] = drawn
        above, below = figure.axes
        with Image.open(tmp_path / "g.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        for number in range(steps):
            x, y = above.transData.transform((number + 1, cosine[number]))
            red, _, blue = pixels[pixels.shape[0] - 1 - round(y), round(x)]
            assert (blue - red > 60) if gate[number] else (red - blue > 60), number
        assert len(above.lines) == 1  # at 0
        assert not any("mean" in text for text in texts(figure))
        edges = below.patches[0].get_data().edges
        assert (edges[0], edges[-1]) == (0.5, steps + 0.5)
        assert all(tick == round(tick) for tick in below.get_xticks())

    @pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
    def test_everything_lies_in_the_picture(self, tmp_path: Path, drawn: list, scale: float) -> None:
        """The title beside long numbers of the axis was cut off."""
        cosine = scale * np.linspace(-0.3, 0.3, 30)
        save_gate(tmp_path / "g.png", step=range(30), cosine=cosine, gate=cosine >= 0, title="t", source="real")
        [figure] = drawn
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1

    def test_the_longest_name_of_a_run_is_whole(self, tmp_path: Path, drawn: list) -> None:
        long = "folder-CAMUS-512-poisson30+blur1.5-gradprom-dia+seg-lambda0.001+0.01-gateproject-max-steps1200-s12, seg"
        for name in (long, "short"):
            save_gate(tmp_path / "g.png", step=range(3), cosine=[0.1] * 3, gate=[1] * 3, title=name, source="real")
            save_panel(tmp_path / "p.png", **batch(), title=name, source="real")
        sizes = []
        for figure in drawn:
            title = figure.texts[0]
            sizes.append(title.get_fontsize())
            assert title.get_window_extent().x1 <= figure.bbox.x1
        assert sizes[2:] == [11.5, 11.5], "a name that fits keeps its size"
        assert min(sizes) >= 6

    def test_lengths_must_agree(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="3 steps"):
            save_gate(tmp_path / "g.png", step=range(3), cosine=[0.1], gate=[1], title="t", source="real")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"missing/panel\.png cannot be written"):
        save_panel(tmp_path / "missing" / "panel.png", **batch(), title="t", source="real")
    assert list(tmp_path.iterdir()) == []


def test_nothing_global_is_changed(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save_panel(tmp_path / "panel.png", **batch(), title="t", source="real")
    assert dict(matplotlib.rcParams) == before
