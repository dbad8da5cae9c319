"""The page's style sheet: one column of text, cards that flow, tables that scroll in their own box;
light and dark."""

# Six hues told apart by people with colour blindness, darker on white and lighter on black.
_LIGHT = ("#1f6fc4", "#d9541e", "#12855c", "#a86f00", "#8a4fbf", "#c2347a")
_DARK = ("#6db0f5", "#ff8f5e", "#4cc79a", "#e6b13d", "#c39cf2", "#f587b6")


def _scheme(colours: tuple[str, ...], **names: str) -> str:
    hues = "".join(f"--c{i + 1}:{colour};" for i, colour in enumerate(colours))
    return hues + "".join(f"--{name.replace('_', '-')}:{value};" for name, value in names.items())


_LIGHT_SCHEME = _scheme(
    _LIGHT,
    ground="#f7f7f5",
    paper="#ffffff",
    ink="#1c1d1f",
    soft="#5b5f66",
    rule="#e3e3df",
    grid="#ececea",
    edge="#d9d9d4",
    mark="#fff3cf",
    good="#0f7a4f",
    warn="#8a5a00",
)
_DARK_SCHEME = _scheme(
    _DARK,
    ground="#141517",
    paper="#1c1e21",
    ink="#ececeb",
    soft="#a3a8b0",
    rule="#32353a",
    grid="#2a2d31",
    edge="#0c0d0e",
    mark="#3d3517",
    good="#58cf9c",
    warn="#e6b13d",
)

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT_SCHEME}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK_SCHEME}}}}}"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main,header,footer{max-width:1200px;margin:0 auto;padding:0 20px}
header{padding-top:40px}
h1{font-size:1.75rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 .3rem}
h2{font-size:1.2rem;font-weight:640;letter-spacing:-.005em;margin:3rem 0 .25rem}
h3{font-size:.98rem;font-weight:620;margin:0}
p{margin:.25rem 0}
.lead,figcaption p,.says,footer{color:var(--soft);font-size:.9rem}
.says{max-width:72ch;margin-bottom:1rem}
a{color:var(--c1)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin-top:1.1rem;padding:.7rem 0;border-top:1px solid var(--rule);border-bottom:1px solid var(--rule);font-size:.92rem}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
.notes{margin:1rem 0 0;padding:.6rem 1rem;background:var(--mark);border-radius:6px;font-size:.92rem}
.of{margin:1.2rem 0 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px;margin-top:1rem}
.pair .scroll{margin-top:0}
.pair thead th{white-space:normal}
@media (min-width:1000px){.pair svg text{font-size:10px}}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,150px),1fr));gap:12px;margin:.5rem 0 0}
.tile{background:var(--paper);border:1px solid var(--rule);border-radius:8px;padding:12px 16px 13px}
.tile dt{color:var(--soft);font-size:.82rem}
.tile dd{margin:.1rem 0 0;font-size:1.45rem;line-height:1.25;font-weight:620;letter-spacing:-.01em}
.tile dd small{font-size:.82rem;font-weight:400;color:var(--soft);letter-spacing:0;white-space:nowrap}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:16px;margin-top:1rem}
.card{margin:0;background:var(--paper);border:1px solid var(--rule);border-radius:8px;padding:14px 14px 8px;min-width:0;display:flex;flex-direction:column}
.card svg{display:block;width:100%;height:auto;margin-top:auto;padding-top:8px}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.82rem;color:var(--soft);margin-top:.35rem}
.key{display:inline-flex;align-items:center;gap:.4em}
.swatch{width:.75em;height:.75em;border-radius:2px;flex:none;background:currentColor}
.marker-key{width:1em;height:0;border-radius:0;border-top:2px solid var(--ink);background:none}
svg text{fill:var(--soft);font-size:12.5px;font-family:inherit}
.axis-name{font-size:12px}
.grid{stroke:var(--grid)}.axis{stroke:var(--soft);stroke-opacity:.55}
.line{fill:none;stroke:currentColor;stroke-width:1.9;stroke-linejoin:round}
.dashed{stroke-dasharray:5 4;stroke-width:1.5}
.band{fill:currentColor;opacity:.17;stroke:none}
.dot,.bar{fill:currentColor}
.marker{stroke:var(--ink);stroke-width:2}
"""
    + "".join(f".s{i}{{color:var(--c{i})}}" for i in range(1, 7))
    + """
.scroll{overflow-x:auto;background:linear-gradient(90deg,var(--paper) 30%,transparent) local,linear-gradient(270deg,var(--paper) 30%,transparent) 100% 0 local,linear-gradient(90deg,var(--edge),transparent) scroll,linear-gradient(270deg,var(--edge),transparent) 100% 0 scroll,var(--paper);background-size:48px 100%,48px 100%,16px 100%,16px 100%,auto;background-repeat:no-repeat;min-width:0;border:1px solid var(--rule);border-radius:8px;margin-top:1rem;overflow-wrap:normal}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--c1);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:.45rem .85rem;text-align:left;border-top:1px solid var(--rule);vertical-align:top}
tr:first-child>th,tr:first-child>td{border-top:0}
thead th{color:var(--soft);font-weight:550;font-size:.83rem;white-space:nowrap}
tbody tr:first-child>*{border-top:1px solid var(--rule)}
tbody th{font-weight:550;white-space:nowrap}
.n{text-align:right;white-space:nowrap}
.se{color:var(--soft);font-size:.84em}
.run{white-space:nowrap}
.run .swatch{display:inline-block;margin-right:.5em}
.item{min-width:13rem}
.because{color:var(--soft);font-size:.86rem;min-width:30rem}
.hit{color:var(--good);font-weight:620;white-space:nowrap}
.hit-row{background:color-mix(in srgb,var(--good) 9%,transparent)}
.user{background:var(--paper);border:1px solid var(--rule);border-radius:8px;padding:16px 18px 18px;margin-top:1rem}
.user .scroll{margin-top:.7rem}
.user h4{margin:1rem 0 0;font-size:.92rem;font-weight:600}
.history{color:var(--soft);font-size:.9rem}
.history b{color:var(--ink);font-weight:400}
.sections{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr));gap:16px;margin-top:1rem}
.section{background:var(--paper);border:1px solid var(--rule);border-radius:8px;padding:12px 16px;min-width:0}
.section dl{display:grid;grid-template-columns:minmax(0,auto) minmax(0,1fr);gap:.18rem 1rem;margin:.5rem 0 0;font-size:.88rem}
.section dt{color:var(--soft)}
.section dd{margin:0;text-align:right}
.section .changed{font-weight:620}
summary{cursor:pointer;color:var(--c1);font-size:.92rem;margin-top:1rem}
footer{padding-top:3rem;padding-bottom:3rem}
@media (max-width:480px){main,header,footer{padding-left:14px;padding-right:14px}header{padding-top:24px}h1{font-size:1.45rem}.tiles{grid-template-columns:1fr 1fr}.tile{padding:10px 12px}.tile dd{font-size:1.2rem}.item{min-width:9rem}}
@media print{body{background:#fff}.card,.section,.user,.tile{break-inside:avoid}}
"""
)
