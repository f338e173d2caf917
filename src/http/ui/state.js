// The state view: is all well, how far is the archive, and what is where. Shows each answer of /api/state, and asks
// for /api/coverage and /api/check once a minute.

import { get } from './api.js';
import { calendar } from './calendar.js';
import { lineChart } from './charts.js';
import { clean, errorBox, h, icon, name, replace, setReady, spinner } from './dom.js';
import * as format from './format.js';
import { values, valuesTable } from './table.js';

/** The lag is bad at so many times of what is wanted at most. */
const BAD_LAG = 3;
const LEVELS = { ok: 'Good', warning: 'Warning', error: 'Error' };
const TABLE_STATES = { streaming: 'ok', gap: 'error' };
const BYTE_STEPS = Array.from({ length: 50 }, (_, power) => 2 ** power);

const section = (title, ...content) => h('section.panel', { 'aria-label': title }, h('h2', title), content);

/** A card; `share` fills its bar, where there is a mark at `markAt`. */
function card(title, { text, level = '', lines, share = null, markAt = null }) {
	const [bar, mark] = [h('span'), h('i', { hidden: markAt === null })];
	bar.style.width = `${Math.min(share, 1) * 100}%`;
	mark.style.left = `${markAt * 100}%`;
	const meter = h('div.meter', { hidden: share === null }, bar, mark);
	const small = lines.filter(Boolean).map((line) => h('p', line));
	return h('div.card', { role: 'group', 'aria-label': title, data: { level } }, h('h3', title), h('p.big', text), meter, small);
}

function cards({ archives, lag_seconds: lag, max_lag_seconds: max, buffered_bytes: buffered, memory_bytes: memory, watermarks }) {
	const bad = BAD_LAG * max;
	const slot = watermarks?.slot;
	const unused = format.seconds(slot?.inactive_since);
	const isLost = slot?.wal_status === 'lost' || slot?.invalidation_reason;
	const tables = watermarks?.tables ?? [];
	const sum = (key) => tables.reduce((total, table) => total + (table[key] ?? 0), 0);
	return [
		card('Lag', {
			text: format.duration(lag),
			level: lag === null ? '' : lag > bad ? 'error' : lag > max ? 'warning' : 'ok',
			share: lag === null ? null : lag / bad,
			markAt: 1 / BAD_LAG,
			lines: archives ? [`wanted at most ${format.duration(max)}`, `bad from ${format.duration(bad)} on`] : ['this process only reads'],
		}),
		card('Rows in memory', {
			text: format.bytes(buffered),
			level: buffered > memory * 0.95 ? 'error' : buffered > memory * 0.7 ? 'warning' : 'ok',
			share: memory ? buffered / memory : null,
			lines: [memory && `of ${format.bytes(memory)} that may be used`],
		}),
		card('Replication slot', {
			text: clean(slot?.wal_status ?? '–'),
			level: isLost ? 'error' : slot?.wal_status === 'unreserved' || unused !== null ? 'warning' : '',
			lines: slot
				? [
						`${clean(slot.name)}, keeps ${format.bytes(slot.retained_wal_bytes)} of WAL`,
						`confirmed up to ${slot.confirmed_flush_lsn ?? '–'}`,
						slot.invalidation_reason && `invalidated: ${clean(slot.invalidation_reason)}`,
						unused !== null && `not in use since ${format.time(unused)} UTC`,
					]
				: ['no slot is known'],
		}),
		card('Archive', {
			text: format.bytes(sum('byte_count')),
			lines: [`${format.plural(sum('row_count'), 'row')} in ${format.plural(sum('file_count'), 'file')}`, format.plural(tables.length, 'table')],
		}),
	];
}

/** What there is to say first. */
function headlineOf(state, error, findings) {
	if (error) {
		const title = error.status ? 'The state is not known' : 'Highwater does not answer';
		return ['error', title, state ? `What follows is of ${format.time(state.now, true)} UTC.` : ''];
	}
	const bad = state.checks.filter((check) => !check.is_good);
	const count = (level) => findings.filter((finding) => finding.severity === level).length;
	const passed = `${format.plural(state.checks.length, 'check')} passed.`;
	if (bad.length) {
		return ['error', `Not well: ${bad.map((check) => check.name).join(', ')}`, `${bad.length} of ${format.plural(state.checks.length, 'check')} failed.`];
	}
	if (!state.is_ready) return ['warning', 'Not ready', `${passed} But the process is not ready yet.`];
	if (count('error')) return ['error', 'Something is wrong', `${passed} But there is more: see the findings.`];
	if (!state.watermarks) return ['ok', 'All is well, and the archive is empty', `${passed} Nothing was archived so far.`];
	return ['ok', 'All is well', `${passed}${count('warning') ? ` There are warnings: see the findings.` : ''}`];
}

const checkItem = (level, title, text, remedy) =>
	h(
		'li.check',
		{ data: { level, name: title } },
		icon(level),
		h('div', h('b', name(title)), h('span.sr', ` ${LEVELS[level]}: `), h('p', clean(text)), remedy && h('p.remedy', clean(remedy))),
	);

function purgeOf(purge, now) {
	if (!purge) return h('span.muted', 'not set up');
	const last = purge.purged_at ? `last ${format.ago(format.seconds(purge.purged_at), now)}` : 'never purged';
	const blocked = `${format.plural(purge.blocked_partitions, 'partition')} blocked, about ${format.plural(purge.blocked_rows_estimate, 'row')}`;
	return [
		h('p', h('b', clean(purge.retention ?? 'no retention')), h('span.muted', ` · ${last}`)),
		purge.deletable_partitions > 0 &&
			h('p', `${format.plural(purge.deletable_partitions, 'partition')} can be deleted: ${format.bytes(purge.deletable_bytes)}, about ${format.plural(purge.deletable_rows_estimate, 'row')}`),
		purge.blocked_partitions > 0 && h('details', h('summary', blocked), h('p', clean(purge.blocked_by ?? 'it is not known why'))),
	];
}

const COLUMNS = { State: 'text', Rows: 'number', Files: 'number', Size: 'number', 'Newest row': 'number', Lag: 'number', 'Purge from Postgres': 'purge' };

function cellsOf(table, now) {
	const newest = format.seconds(table.max_created_at);
	return [
		h('span.badge', { data: { level: TABLE_STATES[table.state] ?? 'info' } }, clean(table.state)),
		format.count(table.row_count),
		format.count(table.file_count),
		format.bytes(table.byte_count),
		h('time', { title: `${format.time(newest, true)} UTC` }, format.ago(newest, now)),
		h('span', { title: `archived up to ${table.flushed_lsn}` }, format.bytes(table.lag_bytes)),
		purgeOf(table.purge, now),
	];
}

function tablesTable() {
	const body = h('tbody');
	const head = Object.entries({ Table: 'text', ...COLUMNS }).map(([text, kind]) => h(`th.${kind}`, { scope: 'col' }, text));
	const element = h('table.tables', { test: 'tables' }, h('thead', h('tr', head)), body);
	function rowOf(table) {
		const found = [...body.children].find((row) => row.dataset.table === table);
		if (found) return found;
		const cells = Object.entries(COLUMNS).map(([label, kind]) => h(`td.${kind}`, { data: { label } }));
		body.append(h('tr', { data: { table } }, h('th', { scope: 'row' }, name(table)), cells));
		return body.lastChild;
	}
	function set(tables, now) {
		for (const table of tables) {
			const row = rowOf(table.source_table);
			cellsOf(table, now).forEach((content, at) => replace(row.children[at + 1], content));
		}
	}
	return { element, set };
}

function sampleCharts(shared) {
	let charts = [];
	const shapes = [
		{ key: 'lag_seconds', title: 'Lag', test: 'lag-chart', show: format.duration },
		{ key: 'retained_wal_bytes', title: 'WAL kept by Postgres', test: 'wal-chart', show: format.bytes, incrs: BYTE_STEPS },
	];
	for (const shape of shapes) {
		shape.host = h('div.chart', { test: shape.test });
		shape.last = h('span.muted');
		const make = () => {
			const [times, avg] = data(shape.key);
			return valuesTable('spc', shape.title, [{ found: { times, avg } }], shape.show);
		};
		shape.element = h('div', h('h3', shape.title, ' ', shape.last), shape.host, values(false, make));
	}
	const none = h('p.empty', 'No samples yet: one is taken every 10 s while this process archives.');
	const plots = h('div.two', shapes.map(({ element }) => element));
	const element = section('Last hours', none, plots);

	const samples = () => shared.state.samples;
	const from = () => Math.min(samples()[0].at, shared.now() - 900);

	/** Times and values, with a break where no samples were taken. */
	function data(key) {
		const [times, values] = [[], []];
		for (const sample of samples()) {
			if (sample.at - times.at(-1) > 60) {
				times.push(times.at(-1) + 10);
				values.push(null);
			}
			times.push(sample.at);
			values.push(sample[key]);
		}
		return [times, values];
	}

	function draw() {
		for (const chart of charts) chart.destroy();
		const max = shared.state.max_lag_seconds;
		const bounds = [
			{ value: max, label: 'wanted at most', variable: '--muted', isShown: true },
			{ value: BAD_LAG * max, label: 'bad', variable: '--error' },
		];
		charts = shapes.map(({ key, title, host, show, incrs }) =>
			lineChart(host, {
				data: () => data(key),
				lines: [{ n: 0, isArea: true }],
				bounds: key === 'lag_seconds' ? bounds : [],
				min: 0,
				from,
				to: shared.now,
				height: 190,
				label: `${title} over the last hours. Arrow keys move through the values; a table follows.`,
				sync: 'samples',
				formatValue: show,
				incrs,
				fill(index) {
					const [times, values] = data(key);
					return [h('b', `${format.time(times[index], true)} UTC`), h('div', show(values[index]))];
				},
			}),
		);
	}

	function update() {
		const hasSamples = samples().length > 0;
		none.hidden = hasSamples;
		plots.hidden = !hasSamples;
		if (!hasSamples) return;
		for (const { key, show, last } of shapes) replace(last, show(samples().at(-1)[key]));
		if (charts.length) for (const chart of charts) chart.set();
		else draw();
	}
	const destroy = () => charts.forEach((chart) => chart.destroy());
	return { element, update, redraw: () => charts.length && draw(), destroy };
}

export function mount(root, shared) {
	document.title = 'State · Highwater';
	setReady(false);
	const abort = new AbortController();
	const headline = h('section.headline', { role: 'status', test: 'headline' });
	const top = h('div', spinner('Asking for the state'));
	const cardPlace = h('div.cards');
	const tables = tablesTable();
	const noTables = h('p.empty', 'Nothing is archived yet.');
	const samples = sampleCharts(shared);
	const days = calendar(shared.now);
	const dayPlace = h('div', spinner('Asking which days are archived'));
	const checks = h('ul.checks', { test: 'checks' });
	const findings = h('ul.checks', { test: 'findings' });
	const findingSection = section('Findings', findings);
	const content = h(
		'div.overview',
		{ hidden: true },
		cardPlace,
		section('Days', dayPlace),
		section('Tables', noTables, tables.element),
		samples.element,
		h('div.two', section('Checks', checks), findingSection),
	);
	findingSection.hidden = true;
	root.append(h('h1.sr', 'State'), headline, top, content);

	let found = [];
	let hasCheck = true;
	const awaited = new Set(['state', 'coverage']);
	const done = (part) => awaited.delete(part) && awaited.size === 0 && setReady(true);

	function showHeadline() {
		const [level, title, text] = headlineOf(shared.state, shared.error, found);
		headline.dataset.level = level;
		replace(headline, icon(level), h('div', h('p.title', clean(title)), h('p.muted', clean(text))));
	}

	function onState() {
		const { state, error } = shared;
		if (!state && !error) return;
		showHeadline();
		content.hidden = !state;
		content.classList.toggle('stale', Boolean(error));
		replace(top, error && errorBox(error, shared.poll));
		if (!error) {
			replace(cardPlace, cards(state));
			const known = state.watermarks?.tables ?? [];
			noTables.hidden = known.length > 0;
			tables.element.hidden = known.length === 0;
			tables.set(known, shared.now());
			samples.element.hidden = !state.archives && state.samples.length === 0;
			samples.update();
			replace(checks, state.checks.map((check) => checkItem(check.is_good ? 'ok' : 'error', check.name, check.detail)));
		}
		done('state');
	}

	async function askCoverage() {
		try {
			days.set(await get('coverage', [], abort.signal));
			if (!days.element.isConnected) dayPlace.replaceChildren(days.element);
		} catch (error) {
			if (abort.signal.aborted) return;
			dayPlace.replaceChildren(errorBox(error, askCoverage));
		}
		done('coverage');
	}

	async function askFindings() {
		try {
			found = (await get('check', [], abort.signal)).findings.filter((one) => one.severity !== 'ok');
			replace(findings, found.map(({ severity, id, object, message, remedy }) => checkItem(severity, `${id}: ${object}`, message, remedy)));
			findingSection.hidden = found.length === 0;
			if (shared.state) showHeadline();
		} catch (error) {
			if (error.status === 404) hasCheck = false;
		}
	}

	function everyMinute() {
		if (document.hidden) return;
		askCoverage();
		if (hasCheck) askFindings();
	}
	const timer = setInterval(everyMinute, 60000);
	everyMinute();
	onState();

	return {
		update: () => {},
		onState,
		onTheme: samples.redraw,
		unmount() {
			abort.abort();
			clearInterval(timer);
			samples.destroy();
		},
	};
}
