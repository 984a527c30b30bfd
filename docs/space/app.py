"""A page in the browser that draws from a trained DiT and shows the predicted x_0 as it appears.

    pip install -r docs/space/requirements.txt
    python docs/space/app.py --ckpt results/digits-DiT-Ti-2
    python docs/space/app.py --ckpt DiT-XL/2-256 --dtype bf16

All drawing is done by sample_grid.py, whose sampling flags are what the controls begin with.
"""

import argparse
import os
import queue
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

# The five scripts are two folders above, or in a Space beside this file.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import numpy as np
import torch

import sample_grid
from dit import InputError, run_command

CONTROLS = (  # the controls in their order: flags of sample_grid.py
    "class_labels", "images_per_class", "cfg_scale", "num_sampling_steps", "sampler", "seed")
MOST_IMAGES = 64  # in one picture
FRAMES = 40  # of the predicted x_0, at most


def draw(model, vae, flags):
    """Yield (picture, what it shows) as the images appear; the last picture is a PNG's path.

    flags: the values of sample_grid.py's flags. InputError as its command line gives it.
    """
    # What is asked for, refused in sample_grid.py's own words if it makes no sense.
    sample_grid.check_flags(flags, sample_grid.GRID_FLAGS)
    names = sample_grid.class_names(model)
    labels, nrow = sample_grid.choose_labels(flags, model, names)
    if len(labels) > MOST_IMAGES:
        raise InputError(f"{len(labels)} images are too many: {MOST_IMAGES} at once are possible")
    diffusion, sampling = sample_grid.sampling_settings(flags, model, cfg_scale=4.0)
    if nrow == 1:  # several classes have a column each, a single one has a row
        nrow = flags.nrow = len(labels)
    y = torch.tensor(labels, device=model.pos_embed.device)
    seeds = range(flags.seed, flags.seed + len(labels))
    captions = sample_grid.captions(labels, seeds, names)

    # The sampler calls on_step, but the page asks for pictures: so a thread samples, and what it
    # predicts waits in a queue to be shown. None is the end.
    steps = diffusion.num_timesteps
    shown = set(np.linspace(steps - 1, 1, FRAMES).round())
    frames = queue.SimpleQueue()
    page_is_closed = threading.Event()

    def on_step(i, x, pred_xstart):
        if page_is_closed.is_set():
            raise InterruptedError
        if i in shown:
            frames.put((i, pred_xstart))

    def sample():
        try:
            return sample_grid.sample_images(
                model, diffusion, vae, y, seeds, on_step=on_step, **sampling)
        finally:
            frames.put(None)

    # When somebody leaves the page this generator is closed, and the thread ends at its next step.
    with ThreadPoolExecutor(1) as pool:
        images = pool.submit(sample)
        try:
            for i, pred_xstart in iter(frames.get, None):
                picture = sample_grid.make_grid(vae.decode(pred_xstart), nrow, captions)
                yield picture, f"step {steps - i} of {steps}: the predicted x_0"
        finally:
            page_is_closed.set()

    # The page takes a copy of the file.
    metadata = sample_grid.describe(flags, flags.ckpt, vae, diffusion, sampling)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sample.png")
        sample_grid.save_grid(images.result(), path, nrow, captions, metadata)
        yield path, metadata["command"]


def build_page(args):
    """The page for the model that the flags name; InputError when they name none."""
    device = sample_grid.make_accelerator(tf32=args.tf32).device
    model, vae, size = sample_grid.load_model(args.ckpt, args, device)
    names = sample_grid.class_names(model)
    diffusion, sampling = sample_grid.sampling_settings(args, model, cfg_scale=4.0)

    # A control that was emptied leaves its flag as it is.
    def on_click(*values):
        given = {name: value for name, value in zip(CONTROLS, values, strict=True)
                 if value not in (None, "")}
        try:
            yield from draw(model, vae, argparse.Namespace(**vars(args) | given))
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    # Two columns: what to draw, and the picture.
    with gr.Blocks(title="DiT", delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# A Diffusion Transformer, drawing\n{args.ckpt}: {len(names)} classes, "
                    f"{size} px. The picture, a PNG, keeps its settings.")
        with gr.Row():
            with gr.Column(scale=1):
                controls = [
                    gr.Dropdown(names, value=names[0], label="classes", allow_custom_value=True,
                                info="names or numbers, comma-separated"),
                    gr.Slider(1, 16, 4, step=1, label="images of each class"),
                    gr.Number(sampling["cfg_scale"], label="guidance scale", info="1 is off"),
                    gr.Number(diffusion.num_timesteps, label="steps", precision=0),
                    gr.Radio(diffusion.samplers, value=sampling["sampler"], label="sampler"),
                    gr.Number(0, label="seed", info="image i is drawn from seed + i", precision=0),
                ]
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=2):
                picture = gr.Image(label="picture", format="png", height=480, interactive=False,
                                   buttons=["download", "fullscreen"])
                words = gr.Textbox(label="what it shows", interactive=False, lines=3)
        button.click(on_click, controls, [picture, words], show_progress="minimal")
    return page


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw from a trained DiT in the browser.")
    ckpt = sample_grid.Flag(
        "--ckpt", "a run's folder, a weights file, or a name that downloads; a Space, which has no "
        "command line, says it by the variable CKPT",
        os.environ.get("CKPT", "results/digits-DiT-Ti-2"))
    sample_grid.add_flags(parser, "what to draw from", [ckpt, *sample_grid.MODEL_FLAGS])
    sample_grid.add_sampling_args(parser)
    # Beside them sample_grid.py's other flags, as they are when they are not given.
    return argparse.Namespace(**vars(sample_grid.parse_args([])) | vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_command(lambda args: build_page(args).launch(), parse_args())
