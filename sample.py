"""Draw pictures that follow a condition inside a mask.

  python sample.py --prompt "a red circle" --image photo.png --mask mask.png --adapter runs/canny
  python sample.py --prompt "a red circle" --condition_image edges.png --adapter runs/canny --seeds 1 2 3
  python sample.py --from_json outputs/sample/sample.json --output_dir outputs/again

Writes one PNG per prompt and seed, sheet.png with all of them beside the condition, and sample.json, which repeats the
run. Several adapters at once: every adapter flag takes one value for all or one for each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from localctl.base import load_pipeline, set_scheduler
from localctl.sampling import generate
from localctl.sampling_cli import build_controls, parse, prepare, reproducing_options
from localctl.sampling_files import open_output, save


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags; 0 when done, 2 with one sentence on stderr when something in them cannot work."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv, __doc__)
        job = prepare(options)
        folder = open_output(options.output_dir)
        controls = build_controls(job)
        pipe = load_pipeline(job.base, device=job.device)
        if options.scheduler is not None:
            set_scheduler(pipe, options.scheduler)
        output = generate(
            pipe,
            job.layouts,
            controls,
            options.seeds,
            batch_size=options.batch_size,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            negative_prompt=options.negative_prompt,
        )
        conditions, masks = zip(*((item.condition, item.mask) for item in job.adapters), strict=True)
        for path in save(output, reproducing_options(job), conditions, masks, folder):
            print(path)
    except ValueError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
