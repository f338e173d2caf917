// Light or dark, before anything is drawn: a classic script in the head, so that a dark page does not flash white.
// Knows what the reader chose (localStorage), and else what the system prefers.
(() => {
	const KEY = 'highwater-theme';
	const { dataset } = document.documentElement;
	const system = matchMedia('(prefers-color-scheme: dark)');
	const preferred = () => (system.matches ? 'dark' : 'light');
	const tried = (access) => {
		try {
			return access();
		} catch {
			return null; // Without storage a choice lasts as long as the page.
		}
	};
	let chosen = tried(() => localStorage.getItem(KEY));
	const apply = () => {
		dataset.theme = chosen === 'dark' || chosen === 'light' ? chosen : preferred();
		document.dispatchEvent(new Event('theme'));
	};
	globalThis.toggleTheme = () => {
		chosen = dataset.theme === 'dark' ? 'light' : 'dark';
		if (chosen === preferred()) chosen = null; // What the system prefers anyway is followed.
		tried(() => (chosen ? localStorage.setItem(KEY, chosen) : localStorage.removeItem(KEY)));
		apply();
	};
	system.addEventListener('change', apply);
	apply();
})();
