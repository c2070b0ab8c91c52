// Two things that JupyterLab does not do by itself: pictures show the alternative text in their metadata, and opening a
// notebook does not mark it as modified. Written by hand as the container that JupyterLab loads, so nothing is built.

/** PNGs with the text that Python sent beside them. */
function tellPictures(rendermime) {
  const factory = rendermime.getFactory("image/png");
  const createRenderer = options => {
    const renderer = factory.createRenderer(options);
    const render = renderer.renderModel.bind(renderer);
    renderer.renderModel = async model => {
      await render(model);
      renderer.node.querySelector("img")?.setAttribute("alt", model.metadata["image/png"]?.alt ?? "");
    };
    return renderer;
  };
  rendermime.addFactory({ ...factory, mimeTypes: ["image/png"], createRenderer });
}

/** A kernel of the same name leaves the notebook's metadata as they are, whatever its Python's version. */
function keepKernel(model) {
  const set = model.setMetadata.bind(model);
  model.setMetadata = (key, value) => {
    const isKernel = key === "kernelspec" || key === "language_info";
    if (!isKernel || model.getMetadata(key)?.name !== value?.name) set(key, value);
  };
}

const plugin = {
  id: "vitlib:notebooks",
  autoStart: true,
  activate: app => {
    app.docRegistry.addWidgetExtension("Notebook", {
      createNew: panel => {
        tellPictures(panel.content.rendermime);
        keepKernel(panel.model);
      }
    });
  }
};

window._JUPYTERLAB = window._JUPYTERLAB ?? {};
window._JUPYTERLAB.vitlib = { init: () => {}, get: async () => () => plugin };
