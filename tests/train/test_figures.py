"""Figures: what they show is read back from matplotlib's objects, not from pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import matplotlib.text
import numpy as np
import pytest
import torch
from PIL import Image

from train.errors import RunError
from train.evaluation.statistics import Interval, interval
from train.outputs.figures import (
    Course,
    Point,
    save_attention,
    save_course,
    save_gate,
    save_panel,
    save_strategies,
    save_tradeoff,
    style,
)
from train.outputs.figures.strategies import Crop, crop_of


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[matplotlib.figure.Figure]]:
    """The figures that are saved."""
    saved: list[matplotlib.figure.Figure] = []
    save = style.save

    def spy(figure: matplotlib.figure.Figure, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(style, "save", spy)
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

    def test_what_is_not_known_clean_has_changed_and_not_erred(self, tmp_path: Path, drawn: list) -> None:
        images = {**batch(), "clean": None}
        save_panel(tmp_path / "panel.png", **images, title="t", source="real")
        said = texts(drawn[0])
        assert said.count("mean change 0.090") == 3 and said.count("difference") == 1
        assert not any("PSNR" in text or "error" in text or text == "clean" for text in said)

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


HOSTILE = ("<script>alert(1)</script>", "$x_1$", "two\nlines \udcff", r"$\frac$", 'l\'été "q"', "", "_hidden")


def names(count: int) -> list[str]:
    long = "folder-CAMUS-512-poisson30+blur1.5-gradprom-dia+seg-lambda0.001+0.01-gateproject"
    return ["ip-only", "gradprom", long, *HOSTILE, *(f"strategy {number}" for number in range(count))][:count]


def inside(figure: matplotlib.figure.Figure) -> bool:
    """Whether all that is written lies in the picture."""
    written = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip() and text.get_visible()]
    figure.canvas.draw()
    # Ticks outside the axes' limits are there, but not drawn: the axes' own box knows which.
    ticks = {id(text) for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    boxes = [(text, text.get_window_extent()) for text in written if id(text) not in ticks]
    boxes += [(axes, axes.get_tightbbox()) for axes in figure.axes]
    outside = [
        what
        for what, box in boxes
        if not (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1)
    ]
    print(outside)
    return not outside


def no_formulas(figure: matplotlib.figure.Figure) -> bool:
    every = figure.findobj(matplotlib.text.Text)
    return not any(text.get_parse_math() or text.get_usetex() for text in every)


class TestStrategies:
    @staticmethod
    def images(count: int, channels: int = 1) -> dict:
        clean = torch.full((channels, 48, 64), 0.5)
        enhanced = {name: (clean + 0.01).clone() for name in names(count)}
        return {"clean": clean, "degraded": clean + 0.1, "enhanced": enhanced}

    @pytest.mark.parametrize(("count", "channels"), [(1, 1), (3, 3), (7, 1), (12, 1)])
    def test_each_has_its_image_its_zoom_and_its_error(
        self, tmp_path: Path, drawn: list, count: int, channels: int
    ) -> None:
        images = self.images(count, channels)
        for image in images["enhanced"].values():
            image[:, 8:12, 50:54] += 0.2
        [*_, last] = images["enhanced"].values()
        last[:, 8:12, 50:54] -= 0.2
        save_strategies(tmp_path / "s.png", **images, title="the title", source="phantom")
        [figure] = drawn
        said = texts(figure)
        assert {"the title", "clean", "degraded"} <= set(said)
        assert any("PHANTOM" in text for text in said)
        assert said.count("PSNR 20.00 dB") == 1 and said.count("mean error 0.100") == 1
        shown = [axes.images[0].get_array() for axes in figure.axes if axes.get_label() != "<colorbar>" and axes.images]
        whole, zoomed = [(48, 64)], [(16, 16)]
        assert sorted(each.shape[:2] for each in shown) == sorted(
            (2 * count + 3) * whole + (count + 2) * zoomed  # no error of the clean one
        )
        boxes = figure.findobj(matplotlib.patches.Rectangle)
        framed = [box for box in boxes if (box.get_width(), box.get_height()) == (16, 16)]
        assert len(framed) == 2 * (count + 2)  # dark and light
        if count > 1:  # the first part that holds all of the square in which they differ
            assert {box.get_xy() for box in framed} == {(37.5, -0.5)}
        assert inside(figure) and no_formulas(figure)
        errors = {
            axes.images[0].get_clim()
            for axes in figure.axes
            if axes.images and axes.images[0].get_cmap().name == "inferno"
        }
        assert len(errors) == 1, "one scale"

    def test_the_crop_is_where_the_strategies_differ_most(self) -> None:
        """By looking at every place."""
        random = torch.Generator().manual_seed(0)
        clean = torch.rand(1, 40, 72, generator=random)
        enhanced = [torch.rand(1, 40, 72, generator=random) for _ in range(3)]
        for images in (enhanced, enhanced[:1]):
            several = len(images) > 1
            values = torch.stack(images).double().numpy()
            spread = values.var(0)[0] if several else ((values[0] - clean.double().numpy()) ** 2)[0]
            sums = {
                (top, left): spread[top : top + 16, left : left + 18].sum() for top in range(25) for left in range(55)
            }
            found = crop_of(clean, images)
            assert found == Crop(*max(sums, key=sums.__getitem__), 16, 18)
            images[0][0, 39 if found.top < 12 else 0, 71 if found.left < 27 else 0] = math.nan
            assert crop_of(clean, images) == found, "a pixel that is NaN elsewhere"

    def test_small_images_and_nan(self, tmp_path: Path, drawn: list) -> None:
        clean = torch.full((1, 12, 14), 0.5)
        enhanced = {"spoiled": torch.full_like(clean, math.nan), "other": clean}
        save_strategies(tmp_path / "s.png", clean=clean, degraded=clean, enhanced=enhanced, title="t", source="real")
        assert {"PSNR undefined: NaN", "mean error undefined: NaN", "12 x 14 px"} <= set(texts(drawn[0]))
        assert not any("PHANTOM" in text for text in texts(drawn[0]))

    def test_what_is_refused(self, tmp_path: Path) -> None:
        for wrong in (
            {"enhanced": {}},
            {"enhanced": {"a": torch.zeros(1, 48, 63)}},
            {"degraded": torch.zeros(3, 48, 64)},
        ):
            with pytest.raises(ValueError, match="strategies need"):
                save_strategies(tmp_path / "s.png", **(self.images(2) | wrong), title="t", source="real")


class TestAttention:
    @pytest.mark.parametrize(("count", "channels"), [(1, 1), (5, 3), (9, 1)])
    def test_maps_lie_over_their_images(self, tmp_path: Path, drawn: list, count: int, channels: int) -> None:
        images = {name: torch.full((channels, 20, 30), 0.1 * number) for number, name in enumerate(names(count))}
        maps = {name: torch.full((20, 30), 0.05 * number) for number, name in enumerate(names(count))}
        note = "Class activation of the class $x_1$: " + "a sentence that is long " * 12
        save_attention(tmp_path / "a.png", images=images, maps=maps, title="t", source="phantom", note=note)
        [figure] = drawn
        over = [axes.images for axes in figure.axes if len(axes.images) == 2]
        assert len(over) == count
        for number, (image, heat) in enumerate(over):
            np.testing.assert_allclose(image.get_array(), 0.1 * number, atol=1e-6)
            np.testing.assert_allclose(heat.get_array(), 0.05 * number, atol=1e-6)
            assert heat.get_clim() == (0, 1) and 0 < heat.get_alpha() < 1
        assert any("PHANTOM" in text for text in texts(figure))
        assert any("$x_1$" in text for text in texts(figure))
        assert inside(figure) and no_formulas(figure)

    def test_what_is_refused(self, tmp_path: Path) -> None:
        image, seen = torch.zeros(1, 20, 30), torch.zeros(20, 30)
        for images, maps, message in (
            ({}, {}, "a map for each image"),
            ({"a": image}, {"b": seen}, "a map for each image"),
            ({"a": image}, {"a": seen.T}, r"a: the map is \[30, 20\]"),
        ):
            with pytest.raises(ValueError, match=message):
                save_attention(tmp_path / "a.png", images=images, maps=maps, title="t", source="real", note="")


class TestCourse:
    def test_mean_and_interval_of_the_smoothed_seeds(self, tmp_path: Path, drawn: list) -> None:
        steps = np.arange(1, 151)
        values = np.random.default_rng(0).normal(size=(3, 150))
        courses = {"a": Course(steps, values), "b": Course(steps, values[:1] + 1)}
        save_course(tmp_path / "c.png", courses=courses, ylabel="cosine", title="t", source="phantom", zero=True)
        [figure] = drawn
        [axes] = figure.axes
        zero, first, second = axes.lines
        assert list(zero.get_ydata()) == [0, 0]
        smoothed = values[:, 99:102].mean(1)  # a window of 150 / 50 steps around step 101
        expected = interval(smoothed)
        assert list(first.get_xdata()) == list(steps)
        assert first.get_ydata()[100] == pytest.approx(expected.mean)
        [band] = axes.collections  # one seed has none
        at = band.get_paths()[0].vertices
        assert sorted(set(at[at[:, 0] == 101][:, 1])) == pytest.approx([expected.low, expected.high])
        assert second.get_ydata()[100] == pytest.approx(smoothed[0] + 1)
        assert "step (mean over 1 or 3 seeds, band: 95 % interval of the mean, running mean of 3 steps)" in texts(
            figure
        )
        assert any("PHANTOM" in text for text in texts(figure))

    def test_steps_without_a_value_take_no_part(self, tmp_path: Path, drawn: list) -> None:
        values = np.tile(np.arange(200.0), (2, 1))
        values[:, 50:100] = math.nan  # another phase
        values[0, 150] = math.nan  # a skipped step
        values[0, 151] = 0.0
        courses = {"a": Course(np.arange(200), values), "none": Course(np.arange(200), values * math.nan)}
        save_course(tmp_path / "c.png", courses=courses, ylabel="PSNR (dB)", title="t", source="real")
        [axes] = drawn[0].axes
        line = axes.lines[0].get_ydata()
        assert np.isnan(line[51:99]).all() and np.isfinite(line[:49]).all() and np.isfinite(line[102:]).all()
        # The window of step 151 holds 4 steps; that of the first seed three values.
        around = [np.nanmean(values[:, start : start + 4], 1).mean() for start in (149, 150)]
        assert any(line[151] == pytest.approx(each) for each in around)
        assert "none (none)" in [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(axes.lines) == 2  # none at 0

    @pytest.mark.parametrize("count", [1, 3, 7, 12])
    @pytest.mark.parametrize("seeds", [1, 5])
    def test_many_long_and_hostile_names(self, tmp_path: Path, drawn: list, count: int, seeds: int) -> None:
        steps = np.arange(1, 1001)
        courses = {name: Course(steps, np.full((seeds, 1000), number)) for number, name in enumerate(names(count))}
        save_course(tmp_path / "c.png", courses=courses, ylabel="gate", title=names(3)[-1], source="real")
        [figure] = drawn
        assert len(figure.axes[0].get_legend().get_texts()) == count
        assert inside(figure) and no_formulas(figure)
        assert ("one seed: no interval" in figure.axes[0].get_xlabel()) == (seeds == 1)
        assert max(len(line.get_xdata()) for line in figure.axes[0].lines) <= 300
        looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
        assert len(looks) == count, "no two alike"

    def test_what_is_refused(self, tmp_path: Path) -> None:
        for steps, values in (
            (np.arange(3), np.zeros((2, 4))),
            (np.arange(3), np.zeros(3)),
            (np.arange(3), np.zeros((0, 3))),
        ):
            with pytest.raises(ValueError, match=r"values \[seeds, T\]"):
                Course(steps, values)
        with pytest.raises(ValueError, match="at least one"):
            save_course(tmp_path / "c.png", courses={}, ylabel="y", title="t", source="real")


class TestTradeoff:
    def test_points_bars_and_numbers(self, tmp_path: Path, drawn: list) -> None:
        curve = [
            Point(Interval(27.0, 26.5, 27.5, 3), Interval(0.8, 0.7, 0.9, 3), 1.0),
            Point(Interval(28.0, 27.8, 28.2, 3), Interval(0.7, 0.6, 0.8, 3), 0.01),
            Point(Interval(math.nan, None, None, 3), Interval(0.7, 0.6, 0.8, 3), 10.0),
        ]
        alone = [Point(Interval(28.5, None, None, 1), Interval(0.65, None, None, 1))]
        curves = {"gradprom": curve, "ip-only": alone, "nothing": []}
        save_tradeoff(
            tmp_path / "t.png", curves=curves, xlabel="PSNR (dB)", ylabel="accuracy", title="t", source="phantom"
        )
        [figure] = drawn
        [axes] = figure.axes
        marked = [line for line in axes.lines if line.get_marker() != "None"]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["gradprom", "ip-only", "nothing (none)"]
        assert list(marked[0].get_xdata()) == [28.0, 27.0], "in the order of lambda, without the undefined one"
        assert list(marked[0].get_ydata()) == [0.7, 0.8]
        bars = [(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axes.lines if line not in marked]
        assert sorted(bars) == sorted(
            [
                ((27.8, 28.2), (0.7, 0.7)),
                ((28.0, 28.0), (0.6, 0.8)),
                ((26.5, 27.5), (0.8, 0.8)),
                ((27.0, 27.0), (0.7, 0.9)),
            ]
        )
        assert {text.get_text(): text.xy for text in axes.texts} == {"0.01": (28.0, 0.7), "1": (27.0, 0.8)}
        assert axes.get_xlabel() == "PSNR (dB)\n(numbers: λ; bars: 95 % interval over seeds)"
        assert any("PHANTOM" in text for text in texts(figure))

    @pytest.mark.parametrize("count", [1, 3, 7, 12])
    @pytest.mark.parametrize("seeds", [1, 5])
    def test_numbers_cover_no_point_and_no_other_number(
        self, tmp_path: Path, drawn: list, count: int, seeds: int
    ) -> None:
        random = np.random.default_rng(0)
        curves = {
            name: [
                Point(*(interval(place + 0.1 * random.normal(size=seeds)) for place in random.normal(size=2)), weight)
                for weight in ((None,) if name == "ip-only" else (0.001, 0.01, 0.1, 1.0))
            ]
            for name in names(count)
        }
        save_tradeoff(tmp_path / "t.png", curves=curves, xlabel="x", ylabel="y", title="t", source="real")
        [figure] = drawn
        [axes] = figure.axes
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
        points = [
            axes.transData.transform(point)
            for line in axes.lines
            if line.get_marker() != "None"
            for point in line.get_xydata()
        ]
        assert not any(box.contains(*point) for box in boxes for point in points)
        assert len(boxes) >= 0.8 * 4 * (count - 1)
        assert inside(figure) and no_formulas(figure)

    def test_what_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one"):
            save_tradeoff(tmp_path / "t.png", curves={}, xlabel="x", ylabel="y", title="t", source="real")


def test_a_hundred_lines_look_different() -> None:
    assert len({(each.color, each.marker) for each in map(style.look, range(110))}) == 110


def test_colors_stay_apart_with_every_kind_of_color_vision() -> None:
    """Of the first ten lines: by the simulation of Machado et al. 2009 (severity 1), as distances in CIELAB."""
    from skimage.color import rgb2lab

    simulated = {
        "normal": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    colors = np.array([matplotlib.colors.to_rgb(style.look(number).color) for number in range(10)])
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    for kind, matrix in simulated.items():
        seen = np.clip(linear @ np.transpose(matrix), 0, 1)
        encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = rgb2lab(encoded[None])[0]
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e9 * np.eye(10)
        assert apart.min() >= 8, kind


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"missing/panel\.png cannot be written"):
        save_panel(tmp_path / "missing" / "panel.png", **batch(), title="t", source="real")
    assert list(tmp_path.iterdir()) == []


def test_nothing_global_is_changed(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save_panel(tmp_path / "panel.png", **batch(), title="t", source="real")
    assert dict(matplotlib.rcParams) == before
