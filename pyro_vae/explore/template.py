"""The frame of the page: where its parts are, on a wide and on a narrow window."""

TEMPLATE = """
{% block preamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<style>
  .page { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0 auto; padding: .5rem 1rem;
          max-width: 84rem; box-sizing: border-box }
  h2 { font-size: 1rem; margin: .9rem 0 .3rem 5px }
  main { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 0 2rem;
         grid-template-areas: "plane datum" "move datum"; grid-template-rows: auto 1fr }
  .choices, .sliders { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)) }
  .sliders { grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)) }
  @media (max-width: 52rem) {
    main { grid-template-columns: minmax(0, 1fr); grid-template-areas: "plane" "datum" "move" }
  }
</style>
{% endblock %}
{% block contents %}
<div class="page">
{{ embed(roots.head) }}
<main>
  <section style="grid-area: plane">
    <div class="choices">
      {{ embed(roots.level) }} {{ embed(roots.across) }} {{ embed(roots.up) }}
      {{ embed(roots.color) }}
    </div>
    {{ embed(roots.legend) }} {{ embed(roots.plane) }}
  </section>
  <section style="grid-area: datum">{{ embed(roots.datum) }} {{ embed(roots.change) }}</section>
  <section style="grid-area: move">
    <h2>Move the units</h2>
    <div class="sliders">
      <div>{{ embed(roots.hold) }} {{ embed(roots.sliders) }}</div>
      <div>{{ embed(roots.moved) }}</div>
    </div>
  </section>
</main>
<h2>Table</h2>
{{ embed(roots.table) }}
{{ embed(roots.shared) }}
</div>
{% endblock %}
"""
