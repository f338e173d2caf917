// The calendar of what is where: a cell for each day of each table. Knows what the parts of /api/coverage mean together.

import { h, name, segments, replace } from './dom.js';
import * as format from './format.js';
import * as route from './route.js';

const DAY = 86400;
const [FEWEST_WEEKS, MOST_WEEKS] = [20, 53];
const WEEKDAYS = ['Mon', 'Tue', 'Wed', 'Thu', 'Fri', 'Sat', 'Sun'];
const HINT = 'Point at a day, or move with the arrow keys. A click shows its history.';

/** What a day can be: as the legend says it, and as the sum of a table does. */
const KINDS = {
	archived: ['archived', 'archived'],
	verified: ['archived and verified', 'verified'],
	purged: ['archived, purged from Postgres', 'purged'],
	pending: ['in Postgres, not archived', 'not archived yet'],
	gap: ['gap: rows may be missing', 'with a gap'],
	quarantine: ['rows in quarantine', 'with quarantine'],
	empty: ['no rows', ''],
};

/** What a day is, apart from its quarantine. */
function baseOf(known, isPostgresKnown, isFuture) {
	if (!known) return 'empty';
	if (known.is_gap) return 'gap';
	if (known.files === 0) return known.in_postgres && !(isFuture && known.is_covered) ? 'pending' : 'empty';
	if (isPostgresKnown && !known.in_postgres) return 'purged';
	return known.is_verified ? 'verified' : 'archived';
}

function textOf(known, base, isFuture) {
	if (!known) return 'no rows';
	const rows = known.rows === null ? '' : `${format.plural(known.rows, 'row')} in `;
	const parts = [
		base === 'gap' && 'rows may be missing in the archive',
		known.files > 0 && `archived: ${rows}${format.plural(known.files, 'file')}`,
		known.files > 0 && known.is_verified && 'verified',
		base === 'purged' && 'no longer in Postgres',
		base === 'pending' && 'in Postgres, nothing archived yet',
		base === 'empty' && (isFuture && known.in_postgres ? 'a partition is ready' : 'no rows'),
		known.files > 0 && known.in_postgres && 'still in Postgres',
		known.quarantined > 0 && `${format.plural(known.quarantined, 'row')} in quarantine`,
	];
	return parts.filter(Boolean).join('; ');
}

const dayAt = (text) => Date.parse(text) / 1000;
/** Monday of the week. */
const weekOf = (at) => at - ((Math.floor(at / DAY) + 3) % 7) * DAY;

/** The pages: the last weeks, and if there are more than 53, each year. */
function pagesOf(first, last) {
	const end = weekOf(last) + 6 * DAY;
	const weeks = Math.max((end - weekOf(first)) / DAY / 7, FEWEST_WEEKS);
	const start = weekOf(end) - (Math.min(Math.ceil(weeks), MOST_WEEKS) - 1) * 7 * DAY;
	const pages = [{ id: 'last', label: 'Last 12 months', start, end }];
	const [from, to] = [first, last].map((at) => new Date(at * 1000).getUTCFullYear());
	for (let year = to; first < start && year >= from; year -= 1) {
		pages.push({ id: String(year), label: String(year), start: dayAt(`${year}-01-01`), end: dayAt(`${year}-12-31`) });
	}
	return pages;
}

function legend() {
	const cellOf = (kind) =>
		h('span.cell', { data: kind === 'quarantine' ? { base: 'archived', quarantined: 1 } : { base: kind } });
	return h('ul.legend', { 'aria-label': 'Legend' }, Object.keys(KINDS).map((kind) => h('li', cellOf(kind), KINDS[kind][0])));
}

function grid({ table, days }, page, today, isPostgresKnown) {
	const rows = WEEKDAYS.map((text, row) => {
		const title = h('span.weekday', { role: 'rowheader' }, text);
		title.style.gridRow = row + 2;
		return h('div', { role: 'row' }, title);
	});
	const months = [];
	const cells = new Map();
	const first = weekOf(page.start);
	for (let at = page.start; at <= page.end; at += DAY) {
		const [week, row] = [Math.floor((at - first) / DAY / 7), Math.round((at - first) / DAY) % 7];
		const text = format.day(at);
		const known = days[text];
		const base = baseOf(known, isPostgresKnown, at > today);
		const quarantined = known?.quarantined;
		const title = `${WEEKDAYS[row]} ${text}: ${textOf(known, base, at > today)}`;
		const cell = h('a.cell', {
			role: 'gridcell',
			tabindex: -1,
			href: route.href('history', [['table', table], ['from', text], ['to', format.day(at + DAY)]]),
			title,
			'aria-label': title,
			test: 'day',
			data: { table, day: text, base, kind: quarantined && base !== 'gap' ? 'quarantine' : base },
		});
		if (quarantined) cell.dataset.quarantined = quarantined;
		cell.classList.toggle('today', at === today);
		cell.style.gridArea = `${row + 2} / ${week + 2}`;
		rows[row].append(cell);
		cells.set(text, cell);
		if (text.endsWith('-01') || (at === page.start && text.slice(-2) < '15')) {
			const label = new Date(at * 1000).toLocaleString('en', { month: 'short', timeZone: 'UTC' });
			months.push(h('span.month', { 'aria-hidden': 'true' }, label));
			months.at(-1).style.gridArea = `1 / ${week + 2} / 2 / span 4`;
		}
	}
	const element = h('div.calendar', { role: 'grid', 'aria-label': `Days of ${table}` }, months, rows);
	const all = [...cells.values()];
	(cells.get(format.day(today)) ?? all.at(-1)).tabIndex = 0;
	element.addEventListener('keydown', (event) => {
		const steps = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -7, ArrowRight: 7, PageUp: -28, PageDown: 28 };
		const { day } = event.target.dataset;
		let next;
		if (event.altKey || event.ctrlKey || event.metaKey || !day) return;
		if (event.key in steps) next = cells.get(format.day(dayAt(day) + steps[event.key] * DAY));
		else if (event.key === 'Home') [next] = all;
		else if (event.key === 'End') next = all.at(-1);
		else return;
		event.preventDefault();
		next?.focus();
	});
	element.addEventListener('focusin', (event) => {
		for (const cell of all) cell.tabIndex = cell === event.target ? 0 : -1;
	});
	return element;
}

function sumOf({ days }, today, isPostgresKnown) {
	const counts = {};
	const add = (kind) => (counts[kind] = (counts[kind] ?? 0) + 1);
	for (const [text, known] of Object.entries(days)) {
		const base = baseOf(known, isPostgresKnown, dayAt(text) > today);
		if (known.files > 0) add('archived');
		if (base !== 'archived') add(base);
		if (known.quarantined > 0) add('quarantine');
	}
	const said = Object.keys(KINDS).filter((kind) => counts[kind] && kind !== 'empty');
	return said.length ? `days: ${said.map((kind) => `${format.count(counts[kind])} ${KINDS[kind][1]}`).join(', ')}` : 'no days';
}

/** The calendar of all tables. `set` shows an answer of /api/coverage. */
export function calendar(now) {
	let [answer, page, drawn] = [null, 'last', ''];
	const years = segments('Year', [], 'page', (id) => set(answer, id));
	const tables = h('div.calendars');
	const readout = h('p.readout.muted', { test: 'readout' }, HINT);
	const note = h('p.muted');
	const element = h('div', h('div.calendar-head.row', legend(), years.element), note, tables, readout);
	const tell = ({ target: { dataset, title } }) => dataset.day && replace(readout, `${dataset.table} · ${title}`);
	tables.addEventListener('focusin', tell);
	tables.addEventListener('mouseover', tell);

	function set(found, id = page) {
		[answer, page] = [found, id];
		const today = Math.floor(now() / DAY) * DAY;
		const text = JSON.stringify([answer, page, today]);
		if (text === drawn) return;
		drawn = text;
		const { database } = answer;
		replace(note, database && ['Postgres is not known, so neither is what is verified, purged or missing: ', name(database)]);
		const all = answer.tables.flatMap(({ days }) => Object.keys(days)).sort();
		readout.hidden = all.length === 0;
		if (all.length === 0) {
			years.set([]);
			tables.replaceChildren(h('p.empty', 'No days yet. They appear here when the first rows are archived.'));
			return;
		}
		const pages = pagesOf(dayAt(all[0]), today);
		const shown = pages.find((one) => one.id === page) ?? pages[0];
		const focused = document.activeElement.dataset;
		const at = tables.contains(document.activeElement) && `[data-table="${CSS.escape(focused.table)}"][data-day="${focused.day}"]`;
		years.set(pages.length > 1 ? pages.map((one) => [one.id, one.label]) : []);
		years.press(shown.id);
		tables.replaceChildren(
			...answer.tables.map((table) => {
				const head = h('div.calendar-title.row', h('h3', name(table.table)), h('span.muted', sumOf(table, today, !database)));
				return h('section', head, h('div.scroll', grid(table, shown, today, !database)));
			}),
		);
		if (at) tables.querySelector(at)?.focus({ preventScroll: true });
	}
	return { element, set };
}
