"""The nodes' help pages in languages other than English, made of the texts in locales/.

python tests/help_pages.py writes them anew; run it when a text in locales/ has changed.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Headings: inputs, outputs.
HEADINGS = {
    "ar": ("المدخلات", "المخرجات"),
    "es": ("Entradas", "Salidas"),
    "fa": ("ورودی‌ها", "خروجی‌ها"),
    "fr": ("Entrées", "Sorties"),
    "he": ("קלטים", "פלטים"),
    "ja": ("入力", "出力"),
    "ko": ("입력", "출력"),
    "pt-BR": ("Entradas", "Saídas"),
    "ru": ("Входы", "Выходы"),
    "tr": ("Girdiler", "Çıktılar"),
    "zh": ("输入", "输出"),
    "zh-TW": ("輸入", "輸出"),
}


def pages() -> dict[Path, str]:
    """Every page by its file."""
    made = {}
    for language, (inputs, outputs) in HEADINGS.items():
        texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
        for node, text in texts.items():
            lines = [f"# {text['display_name']}", "", text["description"]]
            for heading, group in ((inputs, text["inputs"]), (outputs, text["outputs"])):
                lines += ["", f"## {heading}", ""]
                lines += [f"- **{one['name']}**: {one['tooltip']}" for one in group.values()]
            made[ROOT / "web" / "docs" / node / f"{language}.md"] = "\n".join(lines) + "\n"
    return made


if __name__ == "__main__":
    for file, text in pages().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
