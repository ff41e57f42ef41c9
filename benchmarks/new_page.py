"""Begin the page of a new method: `python -m benchmarks.new_page NAME` writes docs/methods/NAME.md.

What the method's file says is taken over; what only its author knows is marked with TODO. Everything between markers is
written by `benchmarks/tables.py`.
"""

from __future__ import annotations

import re
import sys

from benchmarks import tables
from distillery import methods
from distillery.methods import METHODS

PAGE = """# {title}

{line}

- Paper: {paper}
- Code: {code}
- First images: TODO what the images begin as
- Loss: TODO none, or the terms
- Made together: TODO {groups}

<!-- picture -->
<!-- /picture -->

## What it does

TODO the algorithm in steps, the equation in a plain code block, and what every letter means.

TODO the file says, in short: {implements}

## Run it

```yaml
name: digits_{name}
dataset: {{name: digits}} # inside scikit-learn: nothing is fetched
teacher: {{net: convnet2, net_options: {{width: 32}}, epochs: 8, batch: 64, lr: 0.1, flip: 0.0, crop_pad: 1}}
methods:
  - {{method: {name}, ipc: [10]}}
  - {{method: random, ipc: [10]}}
students:
  - {{net: convnet2, net_options: {{width: 32}}, recipe: {{preset: fair-soft, epochs: 100}}}}
```

## Options

<!-- options -->
<!-- /options -->

<!-- recipes -->
<!-- /recipes -->

## Cost

<!-- cost -->
<!-- /cost -->

## What differs from the official code

{differs}

## Published

TODO the paper's numbers as a table, with data set, IPC and student.

## Measured here

<!-- measured -->
<!-- /measured -->
"""
HEADINGS = ("Paper", "Implements", "Code", "Differs", "Target")


def skeleton(name: str) -> str:
    """The page of a method, as far as its file knows it.

    Raises:
        UserError: unknown method.
    """
    method = methods.find(name)
    title, _, line = tables.first_line(method).partition(": ")
    said = sections(method.__doc__ or "")
    made = METHODS[name].groups(methods.config_of(name, {}, "cifar10", 10), ipc=10, classes=10)
    points = re.split(r"\s*\((\d+)\)\s+", said["Differs"])
    differs = [f"{number}. {_sentence(text)}" for number, text in zip(points[1::2], points[2::2], strict=True)]
    return PAGE.format(
        name=name,
        title=title,
        line=_sentence(line),
        paper=said["Paper"],
        code=said["Code"].split()[0].rstrip(".,"),
        groups=f"({len(made)} groups for 10 classes at IPC 10)",
        implements=said["Implements"],
        differs="\n".join(differs) or said["Differs"],
    )


def _sentence(text: str) -> str:
    plain = text.strip().rstrip(";.")
    return f"{plain[:1].upper()}{plain[1:]}."


def sections(text: str) -> dict[str, str]:
    """Heading -> text, in one line each, of a method's docstring."""
    parts = re.split(rf"^({'|'.join(HEADINGS)}): ", text, flags=re.MULTILINE)
    return {head: " ".join(body.split("\n\n")[0].split()) for head, body in zip(parts[1::2], parts[2::2], strict=True)}


def main(name: str) -> int:
    """Write the page, unless there is one."""
    path = tables.PAGES / f"{name}.md"
    if path.exists():
        print(f"{path} is there already; it was left as it is", file=sys.stderr)
        return 1
    path.write_text(skeleton(name))
    print(f"{path}: fill in what says TODO, then run python benchmarks/tables.py")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
