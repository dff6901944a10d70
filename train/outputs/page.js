for (const section of document.querySelectorAll(".comparison")) {
  const frame = section.querySelector(".frame");
  const range = section.querySelector("input");
  const choice = section.querySelector("select");
  const images = section.querySelectorAll(".after");
  const move = () => {
    frame.style.setProperty("--cut", `${range.value}%`);
    range.setAttribute("aria-valuetext", `${range.value} %`);
  };
  const choose = () => {
    images.forEach((image, number) => { image.hidden = number !== Number(choice.value); });
    section.querySelector(".chosen").textContent = choice.selectedOptions[0].textContent;
  };
  range.addEventListener("input", move);
  choice.addEventListener("change", choose);
  move();
  choose();
}
