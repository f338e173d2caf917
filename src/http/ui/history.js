// The history view: which models, which kind of drift, which metrics, and of which time. All of it is in the address:
// a control changes the address, and a changed address shows what it says.

import { get } from './api.js';
import * as charts from './charts.js';
import { DASHES, announce, button, clean, color, colorBox, errorBox, h, icon, name, segments, replace, setReady, spinner, swatch } from './dom.js';
import * as format from './format.js';
import { chip, label, labelText, modelsOf, picker } from './picker.js';
import * as route from './route.js';
import { csv, values, valuesTable } from './table.js';

const DAY = 86400;
const KINDS = { custom: 'Custom metrics', psi: 'PSI', spc: 'SPC' };
/** Days of the ranges; all have no number of them. */
const RANGES = { '24h': ['24 h', 1], '7d': ['7 d', 7], '30d': ['30 d', 30], '90d': ['90 d', 90], '1y': ['1 y', 365], all: ['All', null] };
const DEFAULT_RANGE = '30d';
const BINS = [10, 30, 60, 300, 900, 1800, 3600, 10800, 21600, 43200, DAY, 7 * DAY, 30 * DAY];
/** So many bins may a chart have if their length is chosen. */
const MOST_BINS = 3000;
/** So many metrics are shown if none are chosen. */
const MOST_PANELS = 12;
const HINTS = {
	custom: 'Line: mean of each bin. Band: lower to upper bound.',
	psi: 'Share of each bin of the feature, 0 at the bottom. Beside them, under “all”: the shares of the whole time.',
	spc: 'Line: mean of each bin.',
};

let known = { at: -Infinity, models: [] };
const modelAt = ({ key }) => known.models.find((model) => model.key === key);

/** A time of the address: RFC 3339, or a day. */
const timeOf = (text) => format.seconds(text && text.length > 10 && !/(Z|[+-]\d\d:\d\d)$/.test(text) ? `${text}Z` : text);
/** A time for the address, as short as it can be. */
const timeText = (at) => (at === null ? null : at % DAY === 0 ? format.day(at) : format.rfc3339(at));

/** What the address says. */
function wantedOf(params) {
	const models = params.getAll('m').map(route.modelOf).filter(Boolean);
	const [kind, range, bin] = ['table', 'range', 'bin'].map((key) => params.get(key) ?? '');
	return {
		models: [...new Map(models.map((model) => [model.key, model])).values()].slice(0, DASHES.length),
		kind: Object.hasOwn(KINDS, kind) ? kind : null,
		metrics: [...new Set(params.getAll('metric'))],
		range: Object.hasOwn(RANGES, range) ? range : DEFAULT_RANGE,
		from: timeOf(params.get('from')),
		to: timeOf(params.get('to')),
		bin: /^\d+[smhd]$/.test(bin) ? bin : null,
		isFresh: params.get('fresh') === 'true',
	};
}

const hrefOf = (wanted) =>
	route.href('history', [
		...wanted.models.map(({ key }) => ['m', key]),
		['table', wanted.kind],
		...wanted.metrics.map((metric) => ['metric', metric]),
		['range', wanted.range === DEFAULT_RANGE ? null : wanted.range],
		['from', timeText(wanted.from)],
		['to', timeText(wanted.to)],
		['bin', wanted.bin],
		['fresh', wanted.isFresh ? 'true' : null],
	]);

/** Answers of the API in one shape: [{title, times, avg, lower, upper}], for psi {title, times, ids, shares, overall}. */
function read(kind, answer) {
	const timesOf = ({ created_at: times }) => times.map(format.seconds);
	if (kind === 'psi') {
		return answer.map((found) => {
			const { bin_proportions: bins, overall_proportions: all } = found;
			const ids = [...new Set([...bins, all].flatMap((bin) => Object.keys(bin ?? {})))].sort((a, b) => a - b);
			const shares = ids.map((id) => bins.map((bin) => bin && (bin[id] ?? 0)));
			return { title: found.feature, times: timesOf(found), ids, shares, overall: ids.map((id) => all[id] ?? 0) };
		});
	}
	return Object.entries(answer.metrics ?? answer.features).map(([title, found]) => {
		const column = (key) => found.stats?.map((stat) => stat[key]);
		return { title, times: timesOf(found), avg: found.values ?? column('avg'), lower: column('lower_bound'), upper: column('upper_bound') };
	});
}

const sorted = (titles) => [...new Set(titles)].sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));

export function mount(root, shared) {
	let wanted;
	let abort = new AbortController();
	/** What is on the page: {kind, range, panels}. */
	let shown = { panels: [] };
	/** Titles of metrics, by kind and model, as far as all of them were seen. */
	const titlesSeen = new Map();
	const openTables = new Set();

	const go = (change) => {
		location.hash = hrefOf({ ...wanted, ...change });
	};

	const models = picker({
		models: () => known.models,
		chosen: () => wanted.models.map(({ key }) => key),
		now: shared.now,
		toggle(key) {
			const rest = wanted.models.filter((model) => model.key !== key);
			if (rest.length < wanted.models.length) go({ models: rest });
			else if (rest.length < DASHES.length) go({ models: [...rest, route.modelOf(key)] });
			else announce('No more models fit.');
		},
	});
	const chips = h('div.row', { role: 'group', 'aria-label': 'Models shown' });
	const kinds = segments('Kind of drift', [], 'kind', (kind) => go({ kind, metrics: [] }));
	const ranges = segments('Time', Object.entries(RANGES).map(([id, [text]]) => [id, text]), 'range', (range) => go({ range, from: null, to: null, bin: null }));
	const [fromInput, toInput] = ['from', 'to'].map((test) =>
		h('input', { type: 'datetime-local', step: 1, required: true, 'aria-label': `${test} (UTC)`, data: { test } }),
	);
	const custom = h(
		'form.row',
		{
			onsubmit(event) {
				event.preventDefault();
				const [from, to] = [fromInput, toInput].map((input) => timeOf(input.value));
				toInput.setCustomValidity(from < to ? '' : 'The end must be after the start.');
				if (toInput.reportValidity()) go({ from, to, bin: null });
			},
			oninput: () => toInput.setCustomValidity(''),
		},
		fromInput,
		h('span.muted', 'to'),
		toInput,
		h('span.muted', 'UTC'),
		h('button', { test: 'apply' }, 'Apply'),
	);
	const bin = h('select', { onchange: () => go({ bin: bin.value || null }), test: 'bin' });
	const fresh = h('input', { type: 'checkbox', onchange: () => go({ isFresh: fresh.checked }), test: 'fresh' });
	const freshPlace = h('label.row', { title: 'Also rows in Postgres that are not archived yet' }, fresh, 'fresh rows');
	const csvButton = button([icon('download'), 'CSV'], saveCsv, 'csv');
	const pngButton = button([icon('download'), 'PNG'], () => savePng(shown.panels), 'png');
	const facts = h('span.muted', { test: 'facts' });
	const filter = h('input', { type: 'search', placeholder: 'Narrow', 'aria-label': 'Narrow the list', oninput: narrow });
	const metricList = h('div.metric-list');
	const metricTitle = h('span.muted');
	const allMetrics = button('Reset', () => go({ metrics: [] }), 'all-metrics');
	const metrics = h('div.row', { role: 'group', 'aria-label': 'Metrics', hidden: true }, metricTitle, filter, metricList, allMetrics);
	const bar = h(
		'div.toolbar',
		h('div.row', kinds.element, ranges.element, h('span.grow'), freshPlace, csvButton, pngButton),
		h('div.row', custom, h('label.row.muted', 'Bins', bin), facts),
		metrics,
	);
	const trouble = h('div');
	const progress = h('div.progress');
	const results = h('div.results');
	const controls = h('section.panel.toolbar', { 'aria-label': 'What is shown' }, models.element, chips, bar);
	root.append(h('h1.sr', 'History'), controls, trouble, progress, results);

	function narrow() {
		for (const pill of metricList.children) pill.hidden = !pill.textContent.toLowerCase().includes(filter.value.toLowerCase());
	}

	/** Kinds that the models have; all, if a model is not known. */
	function kindsOf() {
		const found = wanted.models.map(modelAt);
		return Object.keys(KINDS).filter((kind) => found.some((model) => !model || kind in model.kinds));
	}

	function kindShown() {
		const has = kindsOf();
		return has.includes(wanted.kind) ? wanted.kind : has[0] ?? 'custom';
	}

	/** From and to in seconds; `isOpen`, if it goes up to now. */
	function rangeOf(kind) {
		const to = wanted.to ?? Math.ceil(shared.now());
		const days = RANGES[wanted.range][1];
		const firsts = wanted.models.map((model) => modelAt(model)?.kinds[kind] ?? to - 365 * DAY);
		const first = days === null ? Math.min(to, ...firsts) : to - days * DAY;
		const from = wanted.from ?? Math.floor(first / 60) * 60; // Whole minutes: the answer may be in the cache.
		return { from, to: Math.max(to, from + 1), isOpen: wanted.to === null };
	}

	function drawControls() {
		const kind = kindShown();
		const range = rangeOf(kind);
		const remove = (gone) => () => {
			go({ models: wanted.models.filter((model) => model !== gone) });
			controls.querySelector('.chip button')?.focus();
		};
		chips.replaceChildren(...wanted.models.map((model, n) => chip(model, n, remove(model))));
		chips.hidden = bar.hidden = wanted.models.length === 0;
		kinds.set(kindsOf().map((id) => [id, KINDS[id]]));
		kinds.press(kind);
		ranges.press(wanted.from === null && wanted.to === null ? wanted.range : null);
		fromInput.value = format.rfc3339(range.from).slice(0, -1);
		toInput.value = format.rfc3339(range.to).slice(0, -1);
		const fits = (length) => (range.to - range.from) / length >= 2 && (range.to - range.from) / length <= MOST_BINS;
		const lengths = new Set([...BINS.filter(fits).map(format.binName), ...(wanted.bin ? [wanted.bin] : [])]);
		bin.replaceChildren(h('option', { value: '' }, 'auto'), ...[...lengths].map((length) => h('option', length)));
		bin.value = wanted.bin ?? '';
		fresh.checked = wanted.isFresh;
		models.refresh();
		onState();
	}

	function drawMetrics(kind, titles, chosen) {
		replace(metricTitle, kind === 'custom' ? 'Metrics' : 'Features');
		metrics.hidden = titles.length === 0;
		filter.hidden = titles.length <= MOST_PANELS;
		allMetrics.hidden = wanted.metrics.length === 0;
		const boxes = () => [...metricList.querySelectorAll('input')];
		function onchange() {
			const checked = boxes().filter((box) => box.checked).map((box) => box.dataset.metric);
			if (checked.length === 0) this.checked = true; // One is always shown.
			else go({ metrics: checked.length === titles.length && titles.length <= MOST_PANELS ? [] : checked });
		}
		if (boxes().map((box) => box.dataset.metric).join('\n') !== titles.join('\n')) {
			metricList.replaceChildren(
				...titles.map((metric) => h('label.pill', h('input', { type: 'checkbox', onchange, test: 'metric', data: { metric } }), name(metric))),
			);
			narrow();
		}
		for (const box of boxes()) box.checked = chosen.includes(box.dataset.metric);
	}

	/** All metrics of the models; null, if they are not known of each. */
	function titlesOf(kind) {
		const found = wanted.models.map(({ key }) => titlesSeen.get(`${kind} ${key}`));
		return found.every((titles) => titles?.length) ? sorted(found.flat()) : null;
	}

	async function ask(kind, model, range, signal) {
		const { space, name: called, version, key } = model;
		if (!(kind in (modelAt(model)?.kinds ?? KINDS))) return [];
		const pairs = Object.entries({ space, name: called, version, from: format.rfc3339(range.from) });
		if (!range.isOpen) pairs.push(['to', format.rfc3339(range.to)]);
		if (wanted.isFresh && shared.state?.archives) pairs.push(['fresh', 'true']);
		const seen = `${kind} ${key}`;
		const all = titlesOf(kind);
		// Until it is known which there are, all are asked for.
		const only = all && (wanted.metrics.length || all.length <= MOST_PANELS ? wanted.metrics : all.slice(0, MOST_PANELS));
		const width = results.querySelector('.chart')?.clientWidth ?? Math.min(root.clientWidth, 640);
		const bins = wanted.bin ? ['bin', wanted.bin] : ['points', Math.min(500, Math.max(50, Math.round(width / 30) * 10))];
		const part = kind === 'custom' ? 'metric' : 'feature';
		const found = read(kind, await get(`query/${kind}`, [...pairs, bins, ...(only ?? []).map((title) => [part, title])], signal));
		titlesSeen.set(seen, sorted([...(titlesSeen.get(seen) ?? []), ...found.map(({ title }) => title)]));
		return found;
	}

	async function load() {
		abort.abort();
		abort = new AbortController();
		const { signal } = abort;
		setReady(false);
		results.classList.add('loading');
		progress.replaceChildren(spinner('Loading', cancel));
		try {
			if (shared.now() - known.at > 60) {
				known = { at: shared.now(), models: modelsOf(await get('entities', [], signal)) };
				drawControls();
			}
			const [kind, range] = [kindShown(), rangeOf(kindShown())];
			const answers = await Promise.allSettled(wanted.models.map((model) => ask(kind, model, range, signal)));
			signal.throwIfAborted();
			const errors = answers.map(({ reason }, n) => reason && errorBox({ ...reason, title: `${reason.title} · ${labelText(wanted.models[n])}` }, load));
			trouble.replaceChildren(...errors.filter(Boolean));
			const parts = answers.flatMap(({ value }, n) => (value ?? []).map((found) => ({ n, model: wanted.models[n], found })));
			clear();
			if (wanted.models.length) drawResults(kind, range, parts);
			else drawStart();
		} catch (error) {
			if (signal.aborted) return;
			trouble.replaceChildren(errorBox(error, load));
		}
		finish();
	}

	function finish() {
		progress.replaceChildren();
		results.classList.remove('loading');
		csvButton.disabled = pngButton.disabled = !shown.panels.length;
		setReady(true);
	}

	function cancel() {
		abort.abort();
		trouble.replaceChildren(errorBox({ title: 'Cancelled', detail: 'What is shown may be older than what is chosen.' }, load));
		finish();
	}

	function clear() {
		for (const { chart } of shown.panels) chart.destroy();
		shown = { panels: [] };
		results.replaceChildren();
	}

	/** Without a model: some to begin with. */
	function drawStart() {
		const all = known.models;
		const starter = (model) => {
			const about = `${format.plural(model.rows, 'row')}, ${Object.keys(model.kinds).join(', ')}, last ${format.ago(model.last, shared.now())}`;
			return h('a.panel', { href: hrefOf({ ...wanted, models: [model] }), test: 'starter', data: { model: model.key } }, label(model), h('span.muted.small', about));
		};
		const some = [...all].sort((a, b) => b.rows - a.rows).slice(0, 12);
		if (!all.length) results.append(h('p.empty', 'There are no models in the archive yet.'));
		else results.append(
			h('h2', wanted.from === null ? 'Choose a model' : `Choose a model to see it from ${format.time(wanted.from)} UTC on`),
			h('p.muted', `${format.plural(all.length, 'model')} can be found with the field above. With the most rows:`),
			h('div.starters', some.map(starter)),
		);
	}

	function drawResults(kind, range, parts) {
		const titles = titlesOf(kind) ?? sorted(parts.map(({ found }) => found.title));
		const chosen = wanted.metrics.length ? sorted(wanted.metrics) : titles.slice(0, MOST_PANELS);
		drawMetrics(kind, sorted([...titles, ...chosen]), chosen);
		const panels = chosen.flatMap((title) => {
			const found = parts.filter((part) => part.found.title === title && part.found.times.length);
			return kind === 'psi' ? found.map((part) => ({ title, parts: [part] })) : found.length ? [{ title, parts: found }] : [];
		});
		shown = { kind, range, panels };
		const step = charts.stepOf([...new Set(parts.flatMap(({ found }) => found.times))].sort((a, b) => a - b));
		const isCut = chosen.length < titles.length && !wanted.metrics.length;
		replace(facts, panels.length ? `${step ? `bins of ${format.binName(step)}` : 'one bin'}${isCut ? `, the first ${MOST_PANELS} of ${titles.length}` : ''}` : '');
		if (panels.length) {
			const grid = h('div.panels', panels.map(drawPanel));
			results.append(h('p.muted.hint', `${HINTS[kind]} Drag to zoom, double-click to zoom out.`), grid);
			panels.forEach(drawChart);
			announce(format.plural(panels.length, 'chart'));
		} else if (!trouble.firstChild) {
			const href = hrefOf({ ...wanted, range: 'all', from: null, to: null, bin: null });
			results.append(h('p.empty', { test: 'nothing' }, 'There are no rows in this time. ', h('a', { href }, 'Show all of the time')));
		}
	}

	/** What tells the models of the view apart, as text. */
	function shortLabel(model) {
		const keys = ['space', 'name', 'version'].filter((key) => wanted.models.some((other) => other[key] !== model[key]));
		return (keys.length ? keys : ['name', 'version']).map((key) => clean(model[key]) || 'empty').join(' ');
	}

	function drawPanel(panel) {
		const { title, parts } = panel;
		const { kind } = shown;
		const [{ n, model, found }] = parts;
		const isPsi = kind === 'psi';
		panel.host = h('div.chart');
		panel.readout = h('span.readouts.row.muted');
		const isOf = isPsi && wanted.models.length > 1 && h('span.row.muted', swatch(n), h('bdi', shortLabel(model)));
		const props = { class: 'icon-button', title: 'PNG of this chart', 'aria-label': `PNG of ${clean(title)}` };
		const head = h('header.row', h('h3.row', name(title), isOf), panel.readout, button(icon('download'), () => savePng([panel]), 'panel-png', props));
		const key = `${title} ${isPsi ? model.key : ''}`;
		const make = () => valuesTable(kind, title, parts.map((part) => ({ label: shortLabel(part.model), found: part.found })));
		const table = values(openTables.has(key), make, (isOpen) => openTables[isOpen ? 'add' : 'delete'](key));
		panel.colors = charts.rampColors(found.ids?.length ?? 0);
		const bins = isPsi && h('ul.bins', { 'aria-label': 'Bins' }, found.ids.map((id, at) => h('li', colorBox(panel.colors[at]), name(id))));
		const data = { test: 'panel', metric: title, ...(isPsi && { model: model.key }) };
		return h('section.panel.chart-panel', { 'aria-label': clean(title), data }, head, panel.host, bins, table);
	}

	function drawChart(panel) {
		const { title, parts, host, colors } = panel;
		const { kind, range } = shown;
		panel.chart?.destroy();
		const common = {
			from: () => range.from,
			to: () => range.to,
			height: shown.panels.length === 1 ? 340 : 220,
			label: `${clean(title)} from ${format.time(range.from)} to ${format.time(range.to)} UTC. Arrow keys move through the values; a table follows.`,
			sync: 'history',
			onZoom: (start, end) => go({ from: Math.floor(start), to: Math.ceil(end), bin: null }),
			onReset: () => go({ from: null, to: null, bin: null }), // To the range, which is still in the address.
		};
		if (kind === 'psi') {
			const [{ found }] = parts;
			const sums = found.times.map(() => 0);
			const columns = found.shares.map((shares) => shares.map((share, at) => (share === null ? null : (sums[at] += share))));
			const data = charts.align([{ times: found.times, columns }]);
			panel.chart = charts.stackChart(host, { ...common, data: () => data, colors, overall: found.overall, fill: (index) => stackTip(found, colors, data[0][index]) });
			return;
		}
		const hasBand = kind === 'custom';
		const data = charts.align(parts.map(({ found }) => ({ times: found.times, columns: hasBand ? [found.avg, found.lower, found.upper] : [found.avg] })));
		const columns = parts.map((_, part) => data.slice(1).slice(part * (hasBand ? 3 : 1)));
		const fill = (index) => [
			h('b', `${format.time(data[0][index])} UTC`),
			...parts.map(({ n, model }, part) => {
				const [avg, lower, upper] = columns[part].map((column) => column[index]);
				const band = hasBand && Number.isFinite(lower) && h('span.muted', `${format.value(lower)} to ${format.value(upper)}`);
				return h('div', swatch(n), parts.length > 1 && h('bdi.muted', shortLabel(model)), h('span', format.value(avg)), band);
			}),
		];
		panel.chart = charts.lineChart(host, { ...common, data: () => data, lines: parts.map(({ n }) => ({ n, hasBand })), fill });
		/** Values at a time, else the last ones. */
		const readout = (index) =>
			panel.readout.replaceChildren(
				...parts.slice(0, 4).flatMap(({ n }, part) => {
					const [column] = columns[part];
					const value = format.value(index === null ? column.findLast(Number.isFinite) : column[index]);
					return parts.length > 1 ? [swatch(n), value] : [value];
				}),
			);
		(panel.chart.plot.hooks.setCursor ??= []).push(({ cursor }) => readout(cursor.left < 0 ? null : cursor.idx ?? null));
		readout(null);
	}

	function stackTip(found, colors, time) {
		const at = found.times.indexOf(time);
		const rows = found.ids.map((id, row) => {
			const [share, all] = [found.shares[row][at], found.overall[row]];
			const apart = Math.round((share - all) * 1000) / 10 || 0;
			const cells = [format.percent(share), format.percent(all), `${apart > 0 ? '+' : ''}${apart}`];
			return h('tr', h('th', colorBox(colors[row]), name(id)), cells.map((text) => h('td', text)));
		});
		const head = h('tr', ['bin', 'here', 'all', 'differs'].map((text) => h('th', text)));
		return [h('b', `${format.time(time)} UTC`), h('table', h('thead', head), h('tbody', rows.reverse()))];
	}

	function saveCsv() {
		charts.save(new Blob([csv(shown.kind, shown.panels)], { type: 'text/csv' }), `highwater-${shown.kind}.csv`);
	}

	async function savePng(panels) {
		const { kind, range } = shown;
		const times = [range.from, range.to].map((at) => format.time(at, false)).join(' to ');
		const heading = `Highwater · ${KINDS[kind]} · ${times} UTC`;
		const drawn = panels.map(({ title, parts, colors, chart: { plot } }) => {
			const [{ found, model }] = parts;
			if (kind !== 'psi') return { title, plot, keys: parts.map((part) => ({ text: labelText(part.model), color: color(`--s${part.n}`), dash: DASHES[part.n] })) };
			return { title: `${title} · ${labelText(model)}`, plot, keys: found.ids.map((id, at) => ({ text: `bin ${id}`, color: colors[at] })) };
		});
		const blob = await charts.png(heading, drawn);
		if (blob) charts.save(blob, `highwater-${kind}.png`);
	}

	function onState() {
		freshPlace.hidden = !shared.state?.archives;
	}

	return {
		update(params) {
			wanted = wantedOf(params);
			document.title = [...wanted.models.map(labelText), 'History', 'Highwater'].join(' · ');
			drawControls();
			load();
		},
		onState,
		onTheme: () => shown.panels.forEach(drawChart),
		unmount() {
			abort.abort();
			models.destroy();
			clear();
		},
	};
}
