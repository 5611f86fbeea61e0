"""The style sheet of `report.html`: readable on a phone and on a screen, light and dark."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2230; --soft: #5a6475;
  --line: #dfe3ea; --accent: #2f66d0; --rest: #e6eaf1; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2029; --ink: #e8ebf1;
  --soft: #a3adbd; --line: #313847; --accent: #79a6ff; --rest: #2a313e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 24px 16px 48px; }
header p, .note { color: var(--soft); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 8px; }
header p { margin: 4px 0 0; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px; margin-top: 16px; }
section p { margin: 0 0 12px; max-width: 70ch; }
section > :last-child { margin-bottom: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 16px 0 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; }
section .figures { margin: 0 0 12px; }
section .figures div { background: var(--page); }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tr > :last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.wrap { overflow-wrap: anywhere; min-width: 8em; }
.scroll { margin-bottom: 10px; }
.name { overflow-wrap: anywhere; min-width: 7em; }
.bar { display: flex; align-items: center; gap: 8px; min-width: 90px; }
.bar span { flex: 1; height: 12px; border-radius: 3px; background: var(--rest); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
.bar b { width: 1.6em; text-align: right; font-weight: 600; font-variant-numeric: tabular-nums; }
.chart { display: grid; grid-template-columns: auto 1fr; gap: 0 8px; margin: 0 0 12px;
  color: var(--soft); font-size: .8rem; }
.chart svg { display: block; width: 100%; height: 190px; }
.chart ol { list-style: none; margin: 0; padding: 0; display: flex; flex-direction: column;
  justify-content: space-between; text-align: right; line-height: 1; }
.chart p { grid-column: 2; display: flex; justify-content: space-between; margin: 4px 0 0;
  max-width: none; }
.chart rect { fill: var(--accent); stroke: var(--card); stroke-width: 1px;
  vector-effect: non-scaling-stroke; }
.chart line { stroke: var(--line); vector-effect: non-scaling-stroke; }
.chart line.mean { stroke: var(--ink); stroke-dasharray: 5 4; }
pre { margin: 0; padding: 12px; background: var(--page); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; }
"""
