// A saga on its way: look again in a moment, unless somebody is reading an opened part.
setInterval(() => document.querySelector("details[open]") || location.reload(), 2000);
