import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from topk_jax import figures
from topk_jax.decisions import Trials
from topk_jax.figures.style import shortened
from topk_jax.metrics import shape_bias

CATEGORIES = ("bear", "car", "clock", "dog")


def observer(probability_shape, *, probability_decided=0.9, seed=0, never=()):
    """Shape bias of an observer who decides at random; nothing in the categories `never`."""
    rng = np.random.default_rng(seed)
    names, shapes, answers = [], [], []
    for shape in CATEGORIES:
        for exemplar in range(1, 6):
            for texture in CATEGORIES:
                names.append(f"{shape}{exemplar}-{texture}1.png")
                shapes.append(shape)
                decided = rng.random() < probability_decided and shape not in never
                answer = shape if rng.random() < probability_shape else texture
                answers.append(answer if decided else "na")
    trials = Trials.of_network("x", answers, category=shapes, imagename=names)
    return shape_bias(trials, bootstrap=50)


@pytest.fixture(scope="module")
def results():
    return {
        "vgg11": observer(0.2, seed=1),
        "vgg11-topk-10": observer(0.7, seed=2, never=("clock",)),
        "vgg11-rest-10": observer(0.5, probability_decided=0.5, seed=3),
        "humans": observer(0.9, seed=4),
    }


def vertical_lines(axes):
    """(x, colour) of every line over the full height of the axes."""
    return [
        (line.get_xdata()[0], matplotlib.colors.to_rgb(line.get_color()))
        for line in axes.lines
        if len(set(line.get_xdata())) == 1 and list(line.get_ydata()) == [0, 1]
    ]


def test_matrix_shows_every_number(results):
    figure = figures.shape_bias_matrix(results)
    matrix, decided = figure.axes[:2]
    styles = figures.styles_for(results)
    order = [label.get_text() for label in matrix.get_yticklabels()]
    assert sorted(order) == list(CATEGORIES)

    # One vertical line for each observer at its pooled texture fraction.
    expected = [(1 - r.shape_bias, styles[name].color) for name, r in results.items()]
    for line, (x, color) in zip(vertical_lines(matrix), expected, strict=True):
        assert line[0] == pytest.approx(x)
        assert line[1] == pytest.approx(color)

    # One marker for each category and observer, left out where nothing was decided.
    for points, (name, result) in zip(matrix.collections, results.items(), strict=True):
        offsets = {order[round(y)]: x for x, y in np.asarray(points.get_offsets())}
        wanted = {
            category: 1 - row.shape_bias
            for category, row in result.per_category.items()
            if row.n_shape + row.n_texture
        }
        assert offsets == pytest.approx(wanted)
        assert ("clock" in offsets) == (name != "vgg11-topk-10")
        hollow = np.allclose(points.get_facecolor(), 1)
        assert hollow == result.at_chance

    # Bars: S and X of each observer, and the level of guessing.
    widths = [bar.get_width() for bar in decided.patches]
    fractions = [f for r in results.values() for f in (r.shape_fraction, r.texture_fraction)]
    assert widths == pytest.approx(fractions)
    assert [x for x, _ in vertical_lines(decided)] == [2 / 4]
    notes = " ".join(text.get_text() for text in decided.texts)
    for name, result in results.items():
        assert name in notes
        assert f"S {result.n_shape}, X {result.n_texture} of 60" in notes
        assert f"{result.shape_bias:.3f} [{result.shape_bias_ci95[0]:.3f}" in notes
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:4] == list(results)


def test_matrix_axes(results):
    figure = figures.shape_bias_matrix(results)
    matrix = figure.axes[0]
    assert matrix.get_xlim() == (0, 1)
    assert matrix.get_ylim() == (-0.5, 3.5)
    assert "'texture'" in matrix.get_xlabel()
    (top,) = matrix.child_axes
    assert "'shape'" in top.get_xlabel()
    figure.canvas.draw()
    for tick in (0, 0.25, 1):
        below, above = (
            a.transData.transform((x, 0))[0] for a, x in ((matrix, tick), (top, 1 - tick))
        )
        assert above == pytest.approx(below)


def test_order_of_the_categories(results):
    def order(results, **options):
        axes = figures.shape_bias_matrix(results, **options).axes[0]
        return [label.get_text() for label in axes.get_yticklabels()]

    def ranked(result):
        return sorted(CATEGORIES, key=lambda name: -result.per_category[name].shape_bias)

    humans, plain = results["humans"], results["vgg11"]
    assert ranked(humans) != ranked(plain)
    assert order(results) == ranked(humans)
    assert order({"vgg11": plain}) == ranked(plain)
    assert order({"vgg11-topk-10": results["vgg11-topk-10"]})[-1] == "clock"
    mine = ("dog", "bear", "clock", "car")
    assert order(results, category_order=mine) == list(mine)
    with pytest.raises(ValueError, match="expected each of bear, car, clock, dog once"):
        figures.shape_bias_matrix(results, category_order=("dog", "bear", "clock"))


def test_guessers_are_hollow_and_explained():
    guesser = observer(0.5, probability_decided=0.5, seed=3)
    assert guesser.at_chance
    figure = figures.shape_bias_matrix({"guesser": guesser})
    assert np.allclose(figure.axes[0].collections[0].get_facecolor(), 1)
    assert "hollow" in figure.legends[0].get_texts()[-1].get_text()
    box = figures.shape_bias_boxplot({"guesser": guesser}).axes[0].patches[0]
    assert matplotlib.colors.to_rgb(box.get_facecolor()) == (1, 1, 1)


def test_observers_without_a_decision_are_drawn_without_points():
    silent = {"silent": observer(0.5, probability_decided=0)}
    figure = figures.shape_bias_matrix(silent)
    assert vertical_lines(figure.axes[0]) == []
    assert len(figure.axes[0].collections[0].get_offsets()) == 0
    figure.canvas.draw()
    figure = figures.shape_bias_boxplot(silent)
    assert len(figure.axes[0].patches) == 0
    figure.canvas.draw()


def test_boxplot_shows_the_spread_over_categories(results):
    people = [observer(0.9, seed=seed, never=("dog",) * (seed == 7)) for seed in (7, 8, 9)]
    figure = figures.shape_bias_boxplot({**results, "humans": people})
    axes = figure.axes[0]
    boxes = [(box.get_y(), box.get_y() + box.get_height()) for box in axes.patches]
    samples = [
        [row.shape_bias for row in result.per_category.values()]
        for name, result in results.items()
        if name != "humans"
    ]
    samples.append(
        [np.nanmean([p.per_category[name].shape_bias for p in people]) for name in CATEGORIES]
    )
    quartiles = [tuple(np.nanpercentile(sample, [25, 75])) for sample in samples]
    assert boxes == [pytest.approx(pair) for pair in quartiles]
    crosses = [c.get_offsets()[0] for c in axes.collections if len(c.get_offsets()) == 1]
    pooled = [r.shape_bias for n, r in results.items() if n != "humans"]
    pooled.append(np.mean([person.shape_bias for person in people]))
    assert [y for x, y in crosses if x > 0] == pytest.approx(pooled)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(results)


def test_results_that_cannot_be_drawn_together(results):
    with pytest.raises(ValueError, match="at least one observer"):
        figures.shape_bias_matrix({})
    with pytest.raises(ValueError, match="at least one observer"):
        figures.shape_bias_boxplot({})
    with pytest.raises(ValueError, match="at least one observer"):
        figures.shape_bias_boxplot({"humans": []})
    trials = Trials.of_network("x", ["oven"], category=["oven"], imagename=["oven1-car1.png"])
    with pytest.raises(ValueError, match=r"'vgg11' and 'other' have different categories"):
        figures.shape_bias_matrix({**results, "other": shape_bias(trials)})


def test_texts_do_not_overlap(results):
    """Twelve observers with long names: notes stay off one another and inside the picture."""
    names = [
        f"network-with-a-rather-long-name-{i}-of-seventy-characters-topk-{i}" for i in range(12)
    ]
    figure = figures.shape_bias_matrix(dict.fromkeys(names, results["humans"]))
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    matrix, decided = figure.axes[:2]
    texts = [*decided.texts, decided.title, decided.xaxis.label, matrix.xaxis.label]
    texts += [*matrix.get_yticklabels(), *figure.legends[0].get_texts()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            assert not box.overlaps(other.padded(-2))


@pytest.mark.parametrize(
    ("name", "marker", "color"),
    [
        ("humans", "D", (165, 30, 55)),
        ("subject-03", "D", (165, 30, 55)),
        ("AlexNet_normal", "o", (255, 99, 70)),
        ("alexnet", "o", (255, 99, 70)),
        ("AlexNet_topK_10", "v", (70, 180, 180)),
        ("alexnet-topk-50", "v", (40, 30, 30)),
        ("alexnet-topk-15", "v", (62.5, 155, 155)),
        ("alexnet-topk-2.5", "v", (80, 210, 210)),
        ("sparseAlexNet_5%", "v", (80, 210, 210)),
        ("AlexNet_topK_20_Revert", "^", (55, 130, 130)),
        ("alexnet-rest-20", "^", (55, 130, 130)),
        ("VGG_normal", "o", (100, 100, 210)),
        ("vgg16", "o", (100, 100, 210)),
        ("sparseVGG16_40%", "v", (70, 70, 45)),
        ("vit_large_patch16_224", "*", (220, 50, 50)),
        ("ViT-L", "*", (220, 50, 50)),
        ("clip", "X", (40, 183, 62)),
    ],
)
def test_styles_of_the_authors(name, marker, color):
    style = figures.styles_for([name])[name]
    assert style.marker == marker
    assert style.color == pytest.approx([c / 255 for c in color])
    assert (style.line == "--") == (marker == "^")


def test_styles_of_other_networks():
    names = ["builtin", "builtin-topk-5", "builtin-topk-10", "builtin-topk-30", "builtin-topk-50"]
    names += [
        "resnet50",
        "resnet50-topk-10",
        "vgg16_bn",
        "squeezenet1_1-topk-10",
        "mine-5",
        "humans",
    ]
    styles = figures.styles_for(names)
    assert list(styles) == names
    looks = [(style.marker, style.color) for style in styles.values()]
    assert len(set(looks)) == len(names)
    brightness = [sum(styles[name].color) for name in names[1:5]]
    assert brightness == sorted(brightness, reverse=True)
    assert [styles[name].marker for name in names] == list("ovvvvovovsD")
    alone = figures.styles_for(["builtin-topk-10"])
    assert alone["builtin-topk-10"] == styles["builtin-topk-10"]


def test_shortened_names_keep_both_ends():
    assert shortened("short") == "short"
    name = "a-very-long-name-of-some-network-of-mine-topk-12.5"
    assert len(shortened(name)) == 40
    assert shortened(name).startswith("a-very-long-name")
    assert shortened(name).endswith("topk-12.5")


def test_save_writes_the_same_bytes_again(tmp_path, results):
    stems = [tmp_path / "a" / "shape_bias.v1", tmp_path / "b" / "shape_bias.v1"]
    for stem in stems:
        paths = figures.save(figures.shape_bias_matrix(results), stem)
        assert [path.name for path in paths] == ["shape_bias.v1.png", "shape_bias.v1.pdf"]
    for suffix in (".png", ".pdf"):
        first, second = ((stem.parent / f"{stem.name}{suffix}").read_bytes() for stem in stems)
        assert first == second
        assert b"CreationDate" not in first
    assert (tmp_path / "a/shape_bias.v1.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(tmp_path / "a/shape_bias.v1.png") as image:
        assert image.width == 3000
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_contact_sheet_draws_the_images_in_rows(tmp_path):
    colors = np.array(
        [[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [0, 250, 250]], np.uint8
    )
    images = np.broadcast_to(colors[:, None, None], (5, 8, 8, 3))
    figure = figures.contact_sheet(images, labels=list("abcde"), columns=3, title="Five")
    png, _ = figures.save(figure, tmp_path / "sheet")
    pixels = np.asarray(Image.open(png).convert("RGB")).astype(int)
    centers = []
    for color in colors:
        rows, columns = np.nonzero((abs(pixels - color) < 3).all(axis=-1))
        assert len(rows) > 10_000
        centers.append((rows.mean(), columns.mean()))
    y, x = np.transpose(centers)
    assert np.ptp(y[:3]) < 2
    assert np.ptp(y[3:]) < 2
    assert y[3] > y[0] + 100
    assert x[0] < x[1] < x[2]
    assert x[3] == pytest.approx(x[0], abs=2)
    assert x[4] == pytest.approx(x[1], abs=2)
    assert [text.get_text() for text in figure.axes[0].texts] == list("abcde")
    assert figure.get_suptitle() == "Five"


def test_contact_sheet_of_one_wide_image_without_labels():
    figure = figures.contact_sheet(np.zeros((1, 4, 16, 3), np.uint8))
    figure.canvas.draw()
    width, height = figure.get_size_inches()
    assert width > 2 * height
    assert len(figure.axes[0].images) == 1


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((2, 4, 4, 3)), {}, r"expected uint8 \[n, h, w, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), {}, r"expected uint8 \[n, h, w, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), {}, "at least one"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"labels": ["a"]}, "1 labels for 2 images"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"columns": 0}, "0 columns"),
    ],
)
def test_contact_sheet_checks_its_arguments(images, options, message):
    with pytest.raises(ValueError, match=message):
        figures.contact_sheet(images, **options)


def test_pyplot_is_never_loaded():
    code = (
        "import sys, numpy as np\n"
        "from topk_jax import figures\n"
        "from topk_jax.decisions import Trials\n"
        "from topk_jax.metrics import shape_bias\n"
        "t = Trials.of_network('x', ['a'], category=['a'], imagename=['a1-b1.png'])\n"
        "r = {'x': shape_bias(t, bootstrap=0)}\n"
        "for f in (figures.shape_bias_matrix(r), figures.shape_bias_boxplot(r),\n"
        "          figures.contact_sheet(np.zeros((1, 4, 4, 3), np.uint8))):\n"
        "    f.canvas.draw()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_picture_rows_show_every_picture_under_its_title(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        title: [rng.integers(0, 256, (4, 6, 3), dtype=np.uint8) for _ in range(3)]
        for title in ("target", "top")
    }
    figure = figures.picture_rows(rows)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    expected = [picture for pictures in rows.values() for picture in pictures]
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected, strict=True))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["target", "", "", "top", "", ""]
    png, _ = figures.save(figure, tmp_path / "rows")
    with Image.open(png) as image:
        assert image.size[0] == 960  # 1.6 inches a picture at 200 dots


@pytest.mark.parametrize("lengths", [(1, 2), (0, 0), ()])
def test_picture_rows_refuse_uneven_rows(lengths):
    picture = np.zeros((2, 2, 3), np.uint8)
    rows = {str(i): [picture] * length for i, length in enumerate(lengths)}
    with pytest.raises(ValueError, match="expected as many in each, and some"):
        figures.picture_rows(rows)
