"""docs/space: the page in headless Chromium, where gradio, selenium and Chromium are installed."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit import InputError, build_dit, load_checkpoint, save_checkpoint
from sample_grid import captions, load_vae, make_grid, sample_images, sampling_settings

ROOT = Path(__file__).parent.parent
APP = ROOT / "docs" / "space" / "app.py"
DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

needs_gradio = pytest.mark.skipif(
    not importlib.util.find_spec("gradio"),
    reason="gradio is not installed: pip install -r docs/space/requirements.txt")
needs_browser = pytest.mark.skipif(
    not (importlib.util.find_spec("selenium") and DRIVER and BROWSER),
    reason="selenium, chromium or chromedriver is not installed: see .ci/run")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """Weights of a small DiT whose output depends on the class, though it was not trained."""
    torch.manual_seed(0)
    model = build_dit("DiT-Ti/2", depth=1, hidden_size=48, input_size=8, in_channels=1,
                      num_classes=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("space") / "weights.safetensors"
    save_checkpoint(path, model, vae="none", class_names=[str(c) for c in range(10)],
                    sampling=dict(num_sampling_steps=50, cfg_scale=1.5))
    return str(path)


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_grid(ckpt, labels, nrow, seed, **settings):
    """The picture that sample_grid.py would make."""
    from sample_grid import parse_args

    model = load_checkpoint(ckpt)
    args = parse_args([])
    for name, value in settings.items():
        setattr(args, name, value)
    diffusion, sampling = sampling_settings(args, model, cfg_scale=4.0)
    seeds = range(seed, seed + len(labels))
    images = sample_images(
        model, diffusion, load_vae(model), torch.tensor(labels), seeds, **sampling)
    return make_grid(images, nrow, captions(labels, seeds, [str(c) for c in range(10)]))


# ------------------------------------------------------------------------- without a browser


def flags_of(app, ckpt, **controls):
    args = app.parse_args(["--ckpt", ckpt])
    for name, value in controls.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


@needs_gradio
def test_frames_then_the_picture_and_its_command(app, ckpt):
    model = load_checkpoint(ckpt)
    flags = flags_of(app, ckpt, class_labels="3,1", seed=5, num_sampling_steps=100)
    frames = list(app.draw(model, load_vae(model), flags))
    words = [text for _, text in frames]
    assert words[0] == "step 1 of 100: the predicted x_0"
    assert words[-2] == "step 99 of 100: the predicted x_0"
    assert words[-1].startswith("python sample_grid.py --ckpt")
    assert len(frames) == app.FRAMES + 1


@needs_gradio
def test_a_closed_page_stops_the_sampler(app, ckpt):
    model = load_checkpoint(ckpt)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = threading.active_count()
    generator = app.draw(
        model, load_vae(model), flags_of(app, ckpt, class_labels="3", num_sampling_steps=1000))
    next(generator)
    generator.close()
    assert threading.active_count() == before
    assert len(calls) < 900


@needs_gradio
@pytest.mark.parametrize("controls, words", [
    (dict(class_labels="33"), "no class '33'"),
    (dict(class_labels="seven"), "numbers go from 0 to 9"),
    (dict(num_sampling_steps=0), "--num-sampling-steps 0 must be 1 or more"),
    (dict(num_sampling_steps=5000), "--num-sampling-steps 5000 must be 1000 or less"),
    (dict(cfg_scale=float("nan")), "--cfg-scale nan must be a number"),
    (dict(sampler="euler"), "euler"),
    (dict(seed=-1), "--seed -1 must be 0 or more"),
    (dict(class_labels="3", images_per_class=1000), "1000 images are too many: 64"),
])
def test_nonsense_is_refused_in_words(app, ckpt, controls, words):
    model = load_checkpoint(ckpt)
    with pytest.raises(InputError, match=words):
        next(app.draw(model, load_vae(model), flags_of(app, ckpt, **controls)))


@needs_gradio
def test_command_line_refuses_a_checkpoint_that_is_not_there(tmp_path):
    command = [sys.executable, APP, "--ckpt", tmp_path / "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_front_matter_names_the_gradio_that_is_required():
    readme = (APP.parent / "README.md").read_text()
    matter = dict(line.split(": ", 1) for line in readme.split("---\n")[1].splitlines())
    assert matter["sdk"] == "gradio" and (APP.parent / matter["app_file"]).exists()
    assert f"gradio>={matter['sdk_version'].rsplit('.', 1)[0]}" in (
        APP.parent / "requirements.txt").read_text().splitlines()


# ------------------------------------------------------------------------------ with a browser


@pytest.fixture(scope="module")
def address(ckpt, tmp_path_factory):
    """The address of the running page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(
        GRADIO_SERVER_PORT=str(port), GRADIO_TEMP_DIR=str(tmp_path_factory.mktemp("gradio")))
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [sys.executable, APP, "--ckpt", ckpt], env=environment, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_for(lambda: answers(address) or server.poll() is not None, 300)
        assert server.poll() is None, log.read_text()
        yield address
    finally:
        server.terminate()
        server.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window, which finds no host but this one."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", "window-size=1100,900",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
                 "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", dict(performance="ALL"))
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    browser.get(address)
    wait_for(lambda: field(browser, "seed"), 60)
    return browser


def wait_for(happened, seconds):
    """What `happened()` returns once it is true."""
    end = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return result


def answers(address):
    with contextlib.suppress(OSError), urllib.request.urlopen(address) as response:
        return response.status == 200


def field(page, label):
    """The input with this label, or None while there is none."""
    found = page.find_elements("css selector", f"[aria-label='{label}']")
    return found[0] if found else None


def fill(page, label, text):
    from selenium.webdriver.common.keys import Keys

    element = field(page, label)
    element.send_keys(Keys.CONTROL, "a")
    element.send_keys(text, Keys.ENTER)


def click_draw(page):
    page.find_element("xpath", "//button[normalize-space()='Draw']").click()


def words(page):
    return page.find_element("css selector", "textarea").get_property("value")


def picture(page):
    """The URL of the picture, or None while there is none."""
    found = page.find_elements("css selector", "[data-testid='detailed-image'], img")
    return found[0].get_property("src") if found else None


@needs_gradio
@needs_browser
def test_draws_a_three_on_click_and_shows_it_appear(page, ckpt):
    fill(page, "classes", "3")
    fill(page, "steps", "1000")  # so many that a slow browser sees some of them
    fill(page, "seed", "7")
    click_draw(page)

    seen, pictures = [], set()

    def finished():
        seen.append(words(page))
        pictures.add(picture(page))
        return seen[-1].startswith("python")

    wait_for(finished, 300)
    steps = [int(text.split()[1]) for text in seen if text.startswith("step")]
    assert steps == sorted(steps) and len(set(steps)) >= 3
    assert len(pictures - {None}) >= 3

    # The file behind the picture is a PNG that says how it was made, and it is that picture.
    assert "--class-labels 3 " in seen[-1]
    wait_for(lambda: picture(page).endswith("sample.png"), 10)
    with urllib.request.urlopen(picture(page)) as response:
        drawn = Image.open(io.BytesIO(response.read()))
    settings = json.loads(drawn.text["settings"])
    wanted = dict(class_labels="3", images_per_class=4, seed=7, num_sampling_steps=1000,
                  cfg_scale=1.5, sampler="ddpm", ckpt=ckpt)
    assert wanted.items() <= settings.items()
    assert drawn.text["command"] == seen[-1]
    expected = expected_grid(ckpt, [3] * 4, 4, 7, num_sampling_steps=1000)
    assert np.array_equal(np.asarray(drawn.convert("RGB")), np.asarray(expected))


@needs_gradio
@needs_browser
def test_refuses_nonsense_and_goes_on(page):
    fill(page, "classes", "seventeen")
    click_draw(page)
    wait_for(lambda: "no class 'seventeen'" in page.page_source, 30)
    assert words(page) == ""
    fill(page, "classes", "3,1,4")
    fill(page, "steps", "5000")
    click_draw(page)
    wait_for(lambda: "--num-sampling-steps 5000 must be 1000 or less" in page.page_source, 30)
    assert words(page) == ""
    fill(page, "steps", "5")
    click_draw(page)
    wait_for(lambda: words(page).startswith("python"), 60)
    assert "--class-labels 3,1,4 " in words(page)


@needs_gradio
@needs_browser
def test_the_page_asks_no_other_host(page, address):
    with urllib.request.urlopen(f"{address}config") as response:
        assert json.load(response)["analytics_enabled"] is False
    asked = set()
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    asked = {url for url in asked if url.startswith(("http", "ws"))}
    assert asked and [url for url in asked if not url.startswith(address)] == []
