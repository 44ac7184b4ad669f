"""The frame of report.html: its style, and what stands around the sections."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #27303b; font: 16px/1.6 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 56px 24px 80px; }
header p { margin: 0; color: #6d7885; letter-spacing: .08em; text-transform: uppercase; font-size: 13px; }
h1 { margin: 2px 0 28px; font-size: 32px; font-weight: 650; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 19px; font-weight: 620; letter-spacing: -.01em; }
h3 { margin: 0 0 6px; font-size: 14px; font-weight: 620; color: #3565a5; }
section, .tile { background: #fff; border: 1px solid #e6e9ee; border-radius: 12px; }
section { padding: 24px 28px; margin-top: 20px; }
section > p { margin: 12px 0 0; color: #56616e; font-size: 15px; max-width: 84ch; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg + svg { margin-top: 12px; }
svg text { font-family: system-ui, "Segoe UI", Roboto, sans-serif !important; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; }
.tile { padding: 16px 20px; }
.tile b { display: block; font-size: 25px; font-weight: 620; letter-spacing: -.02em; }
.tile span { color: #6d7885; font-size: 13px; }
.cards { columns: 2 320px; column-gap: 36px; margin-top: 18px; }
.card { break-inside: avoid; padding-bottom: 22px; }
.card:only-child { break-inside: auto; padding-bottom: 0; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
td, th { padding: 4px 10px 4px 0; border-bottom: 1px solid #eef0f3; text-align: left; vertical-align: top; }
th { color: #6d7885; font-weight: 500; }
td:first-child { color: #56616e; }
.v { text-align: right; padding-right: 0; overflow-wrap: anywhere; }
.n { text-align: right; }
details { margin-top: 14px; }
summary { cursor: pointer; color: #3565a5; font-size: 14px; margin-bottom: 8px; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · twohop</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<header><p>twohop · {subtitle}</p><h1>{name}</h1></header>
{body}
</main>
</body>
</html>
"""
