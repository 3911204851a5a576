"""How every report looks: no font, picture or script from anywhere; light, dark and on paper."""

STYLE = """
:root { color-scheme: light dark; --ink:#1f2733; --muted:#566070; --rule:#dfe3ea; --page:#f6f7fa;
  --card:#fff; --accent:#332288; --tint:#ecebf7; --good:#0f5c2e; --good-bg:#e4f2e9;
  --warn:#7a3300; --warn-bg:#fff1df; --bad:#8c1616; --bad-bg:#fde9e9; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6e9ef; --muted:#a3adbb; --rule:#343c48;
  --page:#14181e; --card:#1c222a; --accent:#b5adf0; --tint:#2b2a45; --good:#9bdcb4;
  --good-bg:#173424; --warn:#ffc98f; --warn-bg:#40290f; --bad:#ffb0b0; --bad-bg:#461d1d; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 27px; line-height:1.2; margin: 0; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size: 19px; margin: 48px 0 4px; letter-spacing:-.005em; }
h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 6px 0 0; max-width: 76ch; }
.lead, .note { color: var(--muted); }
.note { font-size: 13.5px; }
.head { display:flex; flex-wrap:wrap; gap: 6px 14px; align-items:center; }
.badge { font-size: 13px; font-weight:600; padding: 2px 11px; border-radius: 99px; }
.good { color:var(--good); background:var(--good-bg); }
.warn { color:var(--warn); background:var(--warn-bg); }
.bad { color:var(--bad); background:var(--bad-bg); }
.banner { border-radius: 8px; padding: 11px 16px; margin-top: 14px; max-width:none; }
.banner strong { display:block; }
.cards { display:grid; gap: 14px; margin-top: 14px; grid-template-columns: repeat(6, 1fr); }
.card { background:var(--card); border:1px solid var(--rule); border-radius:10px;
  padding: 14px 18px 15px; grid-column: span 2; min-width:0; }
.card h3 { font-size: 13px; font-weight:600; color:var(--muted); margin:0; }
.card .figure { font-size: 31px; line-height:1.25; font-weight:650; letter-spacing:-.015em;
  margin: 2px 0; font-variant-numeric: tabular-nums; overflow-wrap:anywhere; }
.card .figure small { font-size: 17px; font-weight:500; color:var(--muted); letter-spacing:0; }
.card.word .figure { font-size: 20px; line-height:1.4; padding: 5px 0; }
.card p { margin:0; font-size: 13.5px; line-height:1.45; color:var(--muted);
  overflow-wrap:anywhere; }
.card.half { grid-column: span 3; }
.card.loud { background:var(--warn-bg); border-color:transparent; }
.card.loud h3, .card.loud p, .card.loud .figure { color:var(--warn); }
.charts { display:grid; gap: 14px; margin-top: 14px; grid-template-columns: 1fr 1fr; }
figure { margin:0; background:#fff; color:#2b3340; border:1px solid var(--rule);
  border-radius:10px; padding: 14px 16px 10px; overflow-x:auto; min-width:0; }
.wide { grid-column: 1 / -1; }
figure svg { display:block; width:100%; height:auto; }
figure.wide svg { min-width: 640px; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif !important; }
figcaption { font-size: 14px; font-weight:600; margin-bottom: 8px; }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap: 3px 16px; padding:0; margin:0 0 8px;
  font-size: 13px; }
.legend i { display:inline-block; width:11px; height:11px; border-radius:2px; margin-right:6px; }
.pair { display:grid; gap:14px; grid-template-columns: minmax(0,13fr) minmax(0,9fr);
  margin-top:14px; align-items:start; }
.table { background:var(--card); border:1px solid var(--rule); border-radius:10px;
  padding: 12px 18px 8px; margin-top: 14px; overflow-x:auto; }
.pair .table, .charts .table { margin-top:0; min-width:0; }
.pair .wide { grid-column:auto; }
table { border-collapse:collapse; width:100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
caption { text-align:left; font-weight:600; font-size:14px; padding-bottom: 6px; }
th, td { text-align:right; padding: 5px 0 5px 18px; vertical-align:top; white-space:nowrap;
  border-top:1px solid var(--rule); }
thead th { font-weight:600; color:var(--muted); border-top:0; vertical-align:bottom;
  white-space:normal; line-height:1.3; }
tbody th { font-weight:500; }
tbody th, thead th:first-child, .left { text-align:left; }
th:first-child, td:first-child { padding-left:0; }
tbody th, td.text { white-space:normal; overflow-wrap:anywhere; min-width: 7em; }
.broad tbody th { min-width: 15em; } .pairs th:first-child { width: 32%; }
td ul { margin:0; padding:0; list-style:none; }
tfoot th, tfoot td { font-weight:600; border-top:2px solid var(--rule); }
tfoot th { text-align:left; }
.bar { display:block; height:4px; border-radius:2px; background:var(--rule); margin-top:3px;
  width: 88px; margin-left:auto; }
.bar i { display:block; height:100%; border-radius:2px; background:var(--accent); }
.matrix { width:auto; }
.matrix th, .matrix td { text-align:center; padding: 4px 0; min-width: 2.4em; }
.matrix tbody th { text-align:left; padding-right:18px; min-width:11em; }
.matrix thead th:first-child { text-align:left; }
.matrix .yes { color:var(--accent); } .matrix .no { color:var(--muted); }
.matrix .dropped, .matrix .unknown { color:var(--bad); background:var(--bad-bg); font-weight:700; }
.vh { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); }
code { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap:anywhere; }
td code { white-space:normal; }
details { margin-top: 14px; } summary { cursor:pointer; color:var(--muted); font-size:13.5px; }
.gaps { margin: 4px 0 0; padding-left: 20px; } .gaps li { margin: 3px 0; max-width: 100ch; }
.events th, .events td { padding-left: 12px; } .events th:first-child { padding-left: 0; }
.events .text { min-width: 9em; } .events .brief { min-width: 6.5em; } .events .serial {
  min-width: 17ch; white-space: normal; } .events tbody th { min-width: 7em; }
.events .badge { white-space: nowrap; }
tr.harm th, tr.harm td { background: var(--bad-bg); }
.limits { margin: 8px 0 0; padding-left: 20px; max-width: 84ch; } .limits li { margin: 5px 0; }
footer { margin-top: 44px; border-top:1px solid var(--rule); padding-top: 12px; }
@media (max-width: 820px) { main { padding: 24px 14px 40px; }
  .cards { grid-template-columns: repeat(2, 1fr); } .card, .card.half { grid-column: span 1; }
  .charts, .pair { grid-template-columns: minmax(0,1fr); } }
@media (max-width: 480px) { .card, .card.half { grid-column: 1 / -1; } }
@media print { body { background:#fff; font-size: 12px; } main { max-width:none; padding:0; }
  h2 { break-after:avoid; margin-top: 28px; } figure, .card, .banner, tr { break-inside:avoid; }
  * { print-color-adjust:exact; -webkit-print-color-adjust:exact; } }
@media print and (prefers-color-scheme: dark) { :root { --ink:#1f2733; --muted:#566070;
  --rule:#dfe3ea; --card:#fff; --accent:#332288; --good:#0f5c2e; --good-bg:#e4f2e9;
  --warn:#7a3300; --warn-bg:#fff1df; --bad:#8c1616; --bad-bg:#fde9e9; } }
"""
