"""The style sheet of the report: light and dark, phone and paper."""

from __future__ import annotations

# Okabe and Ito's colours, which colour-blind readers tell apart; a darker yellow on white
STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--dim:#5b6570;--rule:#d9dee3;--soft:#f5f7f9;
--c0:#0072b2;--c1:#d55e00;--c2:#008a63;--c3:#b5558f;--c4:#b07800;--c5:#2b95cf;--c6:#5b4db7;--c7:#444b53}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e7eaed;--dim:#9aa5b0;--rule:#30363d;
--soft:#1c2126;--c0:#4ea8e0;--c1:#f0803c;--c2:#2dc096;--c3:#e08fc0;--c4:#e6b035;--c5:#8ad0f5;
--c6:#a89cf0;--c7:#b9c1c9}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1160px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3em;letter-spacing:-.01em}
header p{margin:0;color:var(--dim)}header b{color:var(--fg)}
section{margin:44px 0}
h2{font-size:1.2rem;margin:0 0 14px;padding-bottom:6px;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:18px 0 6px}
.note{color:var(--dim);font-size:.875rem;max-width:75ch;margin:10px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 14px 7px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--rule)}
thead th{color:var(--dim);font-weight:500;white-space:nowrap;vertical-align:bottom}
tbody th{font-weight:600;white-space:nowrap}
.wide{width:100%}.number{text-align:right;white-space:nowrap}
.text td{overflow-wrap:anywhere;min-width:9em}
.bars{width:100%}.bars tbody th{width:1%;padding-right:24px}
.bars td{padding:3px 12px 3px 0}.bars td.bar{min-width:110px}
.bar span{display:block;padding:2px 8px;border-radius:3px;white-space:nowrap;
background:linear-gradient(to right,color-mix(in srgb,var(--c) 28%,transparent) var(--w),
var(--soft) var(--w));print-color-adjust:exact;-webkit-print-color-adjust:exact}
.key{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.5em;
background:var(--c);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:28px}
figure{margin:0;min-width:0}figcaption{font-weight:600;font-size:.95rem;margin-bottom:8px}
img{max-width:100%;height:auto;border-radius:4px;display:block}
svg{display:block;width:100%;min-width:440px;height:auto;font:13px system-ui,sans-serif}
.grid{stroke:var(--rule)}.axis{stroke:var(--dim)}.tick{fill:var(--dim)}
.line{fill:none;stroke:var(--c);stroke-width:2.25;stroke-linejoin:round;stroke-linecap:round}
.dot{fill:var(--c);opacity:0;stroke:transparent;stroke-width:10}
.dot.last,.dot:hover{opacity:1}
.name{fill:var(--c);font-weight:600}
pre{background:var(--soft);padding:12px 14px;border-radius:6px;overflow-x:auto;margin:0;
font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
code{font:.85rem ui-monospace,SFMono-Regular,Menlo,monospace}
details{margin-top:12px}summary{cursor:pointer;color:var(--dim)}details pre{margin-top:8px}
@media print{body{font-size:11pt}section{break-inside:avoid-page;margin:24px 0}
.scroll{overflow:visible}svg{min-width:0}details:not([open]){display:none}}
"""
