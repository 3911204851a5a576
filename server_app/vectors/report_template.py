"""The words of a page about a run of vectors; the frame is in :mod:`server_app.reporting.page`."""

from __future__ import annotations

from server_app.reporting import page


def render(view: dict[str, object]) -> str:
    """Return the page of what :func:`server_app.vectors.report.view` found."""
    return page.render(TEMPLATE, view)


TEMPLATE = """\
{% extends "frame" %}
{% from "macros" import banner, card, chart %}
{% macro some(number, one, more) %}{{ number|whole }} {{ one if number == 1 else more }}
{%- endmacro %}
{% macro left_out(number) %}
{% if number %}<p class="note">{{ number|whole }} earlier ones are in metrics.jsonl.</p>{% endif %}
{% endmacro %}
{% block lead %}
<p class="lead">Training by task vectors, without rounds: each hospital fine-tuned the published
 base when it suited it and sent the difference; the server merged what had come into the next
 base.</p>
{% endblock %}
{% block unprotected %}
<div class="banner {{ "bad" if not private else "warn" }}" role="note">
<strong>What this run did NOT protect</strong>
<ul class="gaps">
{% for title, words in gaps %}<li><b>{{ title }}</b> {{ words }}</li>
{% endfor %}</ul></div>
{% endblock %}
{% block content %}
<section class="cards" aria-label="Headline figures">
{% call card("Test accuracy", accuracy|percent(2)) %}
{% if shown_round is none %}No test figures of the best base were recorded.{% else %}
Base {{ shown_round }}, {{ shown_how }}
{%- if images %}; {{ images|whole }} test images{% elif accuracy is none %}; it was not tested
{%- endif %}.
{% if interval %} 95% interval {{ interval[0]|percent }} to {{ interval[1]|percent }}.{% endif %}
{% if macro_f1 is not none %} Macro-F1 {{ macro_f1|fixed }}, macro-AUC {{ macro_auc|fixed }}.
{%- endif %}{% endif %}{% endcall %}
{% call card("Validation accuracy", validation|percent(2)) %}
{% if validation is none %}No public images: nothing was validated at the server.{% else %}
On public images{% if first_validation is not none %}; the first base had
 {{ first_validation|percent(2) }}{% endif %}.{% endif %}{% endcall %}
{% call card("Bases published", published|whole) %}
{{ "No base was recorded." if current is none else "Base " ~ current ~ " is current." }}
{{ some(held_count, "candidate was", "candidates were") }} held back.{% endcall %}
{% if private and spent is not none %}
{% call card("Differential privacy", "ε = " ~ spent|epsilon, "δ = " ~ delta|delta,
 "half loud") %}
For ONE vector, per {{ privacy_unit }}, the largest of all. The server saw each vector by itself.
{% endcall %}
{% else %}
{% call card("Differential privacy", "ε was not recorded" if private else
 "No differential privacy in this run", "", "half loud word") %}
The server saw each hospital's vector by itself.{% endcall %}
{% endif %}
{% call card("Data source", source, "", "half word" ~ (" loud" if synthetic else "")) %}
{{ "Synthetic: generated images, no patients." if synthetic else
 "As recorded by the run; its hash is at the end of the page." }}{% endcall %}
{% call card("Vectors", arrivals|whole) %}
{{ late|whole }} late, {{ setback_counts.refused|whole }} more refused,
{{ setback_counts.excluded|whole }} excluded, {{ setback_counts.withdrawal|whole }} taken back.
{% endcall %}
{% call card("Hospitals", delivered|whole, "of " ~ expected|whole) %}
{{ "have" if delivered != 1 else "has" }} sent a vector.
{{ some(setback_counts.refusal, "refusal", "refusals") }} by hospitals.{% endcall %}
{% call card("Wall time", took|duration) %}
Of the server at work.{% if spans is not none %} First event {{ begins }} UTC, last
 {{ spans|duration }} later.{% endif %}{% endcall %}
</section>

<section><h2>When each hospital submitted</h2>
{% if not arrivals %}<p class="note"><strong>No vector arrived.</strong></p>{% endif %}
{% if timeline %}
<p class="note">Dashed lines are bases, with their version. A vector is late if it was trained on
 an older base than the current one; it then counts the less, the later it is.
{% if contributions|length > bar_limit %}The drawing shows the first hospitals; the table has
 all.{% endif %}</p>
<div class="charts">{{ chart(timeline, "wide") }}</div>
{% else %}
<p class="note">No line has a time and a hospital that could be drawn.</p>
{% endif %}
</section>

<section><h2>How good the bases and candidates were</h2>
{% if quality %}
<p class="note">A candidate is what the vectors that wait would make together: it is validated at
 each arrival, on public images.
{% if by_hospitals %}
Before it is published, the hospitals compare it with the current base on their own validation
 images; the server learns sums only.
{% elif judged %}
What is to be published is judged again by the gate.
{% endif %}
{% if moved.margin is not none %}Differences of less than {{ (100 * moved.margin)|fixed(1) }}
 points, two standard errors, are noise.{% endif %}</p>
<div class="charts">{% for item in quality %}{{ chart(item, "wide") }}{% endfor %}</div>
{% else %}
<p class="note">Nothing was validated or tested.</p>
{% endif %}
{% if ensemble %}
{% if ensemble.error %}
{{ banner("bad", "Nothing was merged, and no ensemble could be made.", ensemble.error) }}
{% else %}
<p class="banner warn"><strong>Nothing was merged: {{ ensemble_why }}.</strong>
 What is left is the softmax ensemble of {{ some(ensemble.vectors, "model", "models") }} of
 {{ some(ensemble.hospitals|length, "hospital", "hospitals") }}: test accuracy
 {{ ensemble.accuracy|percent(2) }}, macro-F1 {{ ensemble.macro_f1|fixed }}, macro-AUC
 {{ ensemble.macro_auc|fixed }}, validation {{ ensemble.validation|percent(2) }}. Whoever has its
 folder has each hospital's vector.</p>
{% endif %}
{% endif %}
{% if bases %}
<div class="table"><table class="events"><caption>Bases</caption>
<thead><tr><th scope="col">Version</th><th scope="col" class="left">Time (UTC)</th>
<th scope="col">Arrivals until then</th><th scope="col" class="left">Why</th>
<th scope="col">Vectors in it</th><th scope="col" class="left">Of hospitals</th>
<th scope="col">Validation, change</th><th scope="col">Test accuracy</th>
<th scope="col">Macro-F1</th></tr></thead><tbody>
{% for base in bases %}
<tr><th scope="row">{{ missing if base.row.version is none else base.row.version }}
{%- for mark in base.marks %} <span class="badge {{ "warn" if mark == "replaced later" else
 "good" }}">{{ mark }}</span>{% endfor %}</th>
<td class="left">{{ base.row.at.words }}</td><td>{{ base.row.at.arrivals|whole }}</td>
<td class="text left">{{ base.row.why }}</td><td>{{ base.row.vectors|whole }}</td>
<td class="text left">{{ base.hospitals or missing }}</td>
<td>{{ base.row.validation|percent(2) }}{% if base.change is not none %}<br>{{ base.change|points }}
{%- endif %}</td><td>{{ base.row.accuracy|percent(2) }}</td><td>{{ base.f1|fixed }}</td></tr>
{% endfor %}
</tbody></table>{{ left_out(left_out_of.bases) }}</div>
{% if made_anew %}<p class="note">Bases were made anew or changed by hand after they were published:
 figures of a version from before are those of the model that was published then.</p>{% endif %}
{% endif %}
{% if held %}
<div class="table"><table class="events"><caption>Candidates that were held back, with the gate's
 figures</caption>
<thead><tr><th scope="col">After base</th><th scope="col" class="left">Time (UTC)</th>
<th scope="col" class="left">Why</th><th scope="col">Candidate</th><th scope="col">Current
 base</th><th scope="col">Difference</th><th scope="col">Margin allowed</th>
<th scope="col" class="left">Harmful then</th></tr></thead><tbody>
{% for item in held %}
<tr><th scope="row">{{ missing if item.row.version is none else item.row.version }}</th>
<td class="left">{{ item.row.at.words }}</td>
<td class="text left"><code>{{ item.row.code }}</code> {{ item.why }}</td>
{% if item.row.gained is not none or item.row.lost is not none %}
<td colspan="2">{{ item.row.gained|whole }} images gained, {{ item.row.lost|whole }} lost</td>
<td>{{ missing if item.row.gained is none or item.row.lost is none else
 "%+d"|format(item.row.gained - item.row.lost)|replace("-", "−") ~ " images" }}</td>
<td>{{ item.row.margin|fixed(1) }} images</td>
{% else %}
<td>{{ item.row.candidate|percent(2) }}</td><td>{{ item.row.current|percent(2) }}</td>
<td>{{ item.row.difference|points }}</td>
<td>{{ missing if item.row.margin is none else (100 * item.row.margin)|fixed(1) ~ " points" }}</td>
{% endif %}
<td class="text left">{{ item.harmful or missing }}</td></tr>
{% endfor %}
</tbody></table>{{ left_out(left_out_of.held) }}</div>
{% else %}<p class="note">No candidate was held back.</p>{% endif %}
</section>

<section><h2>What each hospital gave</h2>
{% if contributions %}
<p class="note">{% if private %}ε is for ONE vector, per {{ privacy_unit }}. The sum is the simple
 one of the vectors that came, those taken back included: with the sum of their δ, an upper bound
 for these. Vectors that
 were refused, or never came, and other runs come on top; the hospital's own ledger has all.
{% else %}No vector has an ε: nothing bounds what one may reveal.{% endif %}
{% if moved.rows %} Influence: what the model loses without the hospital, measured {{ moved_on }},
 by validation on public images (all together {{ moved.accuracy|percent(2) }}).{% else %} Influence
 was not measured.{% endif %}</p>
<div class="table"><table class="events"><caption>Contribution of each hospital</caption>
<thead><tr><th scope="col">Hospital</th><th scope="col">Vectors</th><th scope="col">Late</th>
<th scope="col">Published</th><th scope="col" class="left">Was in bases</th>
<th scope="col" class="left">States</th><th scope="col">Images told</th>
{% if any_epsilon %}<th scope="col" class="left">ε of each vector</th>
<th scope="col">Sum of ε</th>{% endif %}<th scope="col">Without it</th>
<th scope="col">Influence</th>
<th scope="col">Setbacks</th></tr></thead><tbody>
{% for row in contributions %}
<tr{% if row.harmful %} class="harm"{% endif %}><th scope="row">{{ row.name }}</th>
<td>{{ row.vectors|whole }}</td><td>{{ row.late|whole }}</td><td>{{ row.published|whole }}</td>
<td class="text brief left">{{ row.bases or missing }}</td>
<td class="text brief left">{{ row.states or missing }}</td>
<td>{{ "≥ " ~ row.least|whole if row.least is not none else missing }}</td>
{% if any_epsilon %}<td class="text brief left">{{ row.epsilons or missing }}
{%- if row.bare %} <strong>{{ row.bare }} without privacy</strong>{% endif %}</td>
<td>{{ row.epsilon_sum|epsilon }}</td>{% endif %}<td>{{ row.without|percent(2) }}</td>
<td>{{ row.moved|points }}
{%- if row.harmful %}<br><span class="badge bad">harms</span>{% endif %}</td>
<td>{{ row.setbacks|whole }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p class="note">No hospital is known of.</p>{% endif %}
{% if influence_chart %}<div class="charts">{{ chart(influence_chart, "wide") }}</div>{% endif %}
{% if judgements|length > 1 %}
<details><summary>Influence at each judgement</summary>
<div class="table"><table><caption>Influence of each hospital at each judgement{{
 ", the latest" if judgements_left_out else "" }}</caption>
<thead><tr><th scope="col">Hospital</th>
{% for label in judgements %}<th scope="col">{{ label }}</th>{% endfor %}</tr></thead><tbody>
{% for name, cells in influence_rows %}
<tr><th scope="row">{{ name }}</th>
{% for cell in cells %}<td>{% if cell is none %}{{ missing }}{% else %}{{ cell.moved|points }}
{%- if cell.harmful %} <span class="badge bad">harms</span>{% endif %}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
{% if class_bars %}<p class="note">How the images were divided: {{ scheme or "not recorded" }}.</p>
<div class="charts">{{ chart(class_bars, "wide") }}</div>{% endif %}
</section>

<section><h2>Refused, excluded, taken back</h2>
{% if setbacks %}
<div class="table"><table class="events"><caption>Refusals, exclusions and withdrawals</caption>
<thead><tr><th scope="col">Hospital</th><th scope="col" class="left">Time (UTC)</th>
<th scope="col" class="left">What</th><th scope="col" class="left">Why</th>
<th scope="col" class="left">Vector, or id in the hospital's log</th></tr></thead><tbody>
{% for item in setbacks %}
<tr><th scope="row">{{ item.row.hospital }}</th><td class="left">{{ item.row.at.words }}</td>
<td class="text left">{{ item.what }}</td>
<td class="text left">{% if item.why %}<code>{{ item.row.why }}</code> {{ item.why }}
{%- else %}{{ item.row.why }}{% endif %}</td>
<td class="left serial"><code>{{ item.row.serial }}</code></td></tr>
{% endfor %}
</tbody></table>{{ left_out(left_out_of.setbacks) }}</div>
{% else %}<p class="note">Nothing was refused, excluded or taken back.</p>{% endif %}
</section>

<section><h2>Vectors</h2>
{% if vectors %}
<details{% if vectors|length <= 30 %} open{% endif %}>
<summary>Each vector that was accepted</summary>
<div class="table"><table class="events"><caption>Vectors, in the order of arrival</caption>
<thead><tr><th scope="col">Hospital</th><th scope="col" class="left">Time (UTC)</th>
<th scope="col">Of base</th><th scope="col">Bases late</th><th scope="col">Norm</th>
<th scope="col">Images told</th>
{% if any_epsilon %}<th scope="col">ε</th><th scope="col">δ</th>{% endif %}
<th scope="col">Own accuracy, base → tuned</th><th scope="col">Candidate validates</th>
<th scope="col" class="left">Serial</th></tr></thead><tbody>
{% for row in vectors %}
<tr><th scope="row">{{ row.hospital }}
{%- if row.fate %} <span class="badge warn">{{ row.fate }}</span>{% endif %}</th>
<td class="left">{{ row.at.words }}</td>
<td>{{ missing if row.version is none else row.version }}</td>
<td>{% if row.late %}<span class="badge warn">{{ row.late|whole }}</span>{% else %}0{% endif %}</td>
<td>{{ row.norm|fixed }}</td><td>{{ "≥ " ~ row.images|whole if row.images is not none
 else missing }}</td>
{% if any_epsilon %}<td>{{ "none" if row.epsilon is none else row.epsilon|epsilon }}</td>
<td>{{ row.delta|delta }}</td>{% endif %}
<td>{{ row.before|percent }} → {{ row.after|percent }}</td>
<td>{{ row.validation|percent(2) }}</td>
<td class="left serial"><code>{{ row.serial }}</code></td></tr>
{% endfor %}
</tbody></table>{{ left_out(left_out_of.vectors) }}</div></details>
<p class="note">The number of images is told as the power of two below it. A hospital's own accuracy
 is what it told of its own validation images{{ ", with noise" if private else "" }}.</p>
{% else %}<p class="note"><strong>No vector arrived.</strong></p>{% endif %}
</section>

{% include "classes" %}
{% endblock %}
{% block limits %}
<li>One run is one draw of training's chance, and of who came when: repeat it before you compare.
{% if interval %}The interval of the accuracy covers the choice of test images only.{% endif %}</li>
<li>{% if validation is not none %}The best base is the one of the best validation accuracy; the
 test images had no say. Validation chose among several: that of the best flatters it a little.
{% else %}Nothing was validated at the server: how the base shown was chosen is in the summary
 alone.{% endif %}</li>
{% if small_classes %}<li>Fewer than {{ small_class }} test images stand behind each of these
 classes, so their figures are rough: {{ small_classes|join(", ") }}.</li>{% endif %}
<li>An influence is measured on public images: a hospital that alone knows a class looks harmless
 without it. Harmful is a reason to look, and no proof of bad will.</li>
{% if private %}
<li>ε and δ bound what ONE vector, with the figures sent along, tells about one
 {{ privacy_unit }}.
{% if privacy_unit == "image" %}A patient with several images at a hospital is protected less.
{% endif %}Trials of other settings on the same images add to the loss.</li>
{% else %}
<li>Without differential privacy, a vector and the model may have memorised single images; treat
 them with the care due to the images themselves.</li>
{% endif %}
{% if setback_counts.withdrawal %}<li>A vector that was taken back is in no base any more, but what
 other hospitals learned from a base that contained it stays in their vectors.</li>{% endif %}
<li>What was excluded, published or taken back by hand while no run was going is not here:
 <code>consilium vectors list</code> tells.</li>
{% if synthetic %}<li>The images are synthetic: nothing here carries over to patients.</li>
{% else %}<li>A test set from one source doesn't show how the model does at another hospital, on
 another scanner, or for another population.</li>{% endif %}
{% endblock %}
"""
